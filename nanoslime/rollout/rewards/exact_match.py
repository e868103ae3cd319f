"""1 where the response is the label, or one of several, else 0."""

from typing import Any

from nanoslime.rollout.rewards.thoughts import without_thoughts


def reward(text: str, label: Any, metadata: dict[str, Any], *, prompt: str = "") -> float:
    """Compares as text, without surrounding white space, and without thoughts; the label may be
    several texts."""
    response = without_thoughts(text, prompt)
    labels = label if isinstance(label, list | tuple) else [label]
    right = {str(one).strip() for one in labels if one is not None}
    return float(response is not None and response.strip() in right)
