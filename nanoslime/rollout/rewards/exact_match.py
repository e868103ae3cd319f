"""1 where the response is the label, else 0."""

from typing import Any

from nanoslime.rollout.rewards.thoughts import without_thoughts


def reward(text: str, label: Any, metadata: dict[str, Any], *, prompt: str = "") -> float:
    """Compares both as text, without surrounding white space, and without thoughts."""
    response = without_thoughts(text, prompt)
    return float(response is not None and response.strip() == str(label).strip())
