"""1 where the response is the label, else 0."""

from typing import Any


def reward(text: str, label: Any, metadata: dict[str, Any]) -> float:
    """Compares both as text, without surrounding white space."""
    return float(text.strip() == str(label).strip())
