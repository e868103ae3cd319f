"""1 where the response is the label, or one of several, else 0."""

from typing import Any

from nanoslime.rollout.rewards.thoughts import of_answer


@of_answer
def reward(response: str, label: Any, metadata: dict[str, Any], is_cut_off: bool) -> float:
    """Compares as text, without surrounding white space, and without thoughts; the label may be
    several texts."""
    labels = label if isinstance(label, list | tuple) else [label]
    right = {str(one).strip() for one in labels if one is not None}
    return response.strip() in right
