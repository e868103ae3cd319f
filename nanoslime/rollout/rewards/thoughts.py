"""What a response says after its thoughts: the part that a reward judges."""

from collections.abc import Callable
from typing import Any

from nanoslime.types import Status

_OPEN = "<think>"
_CLOSE = "</think>"


def without_thoughts(text: str, prompt: str = "") -> str | None:
    """The text after the last `</think>`; the whole text where nothing was thought.

    None where the thoughts have no end: nothing was answered. They begin with `<think>`, in
    the response or at the very end of `prompt`, where some chat templates put it.
    """
    _, _, answer = text.rpartition(_CLOSE)
    if _OPEN in answer:
        return None
    if _CLOSE not in text and prompt.rstrip().endswith(_OPEN):
        return None
    return answer


def of_answer(judge: Callable[[str, Any, dict[str, Any], bool], float]) -> Callable[..., float]:
    """The reward that gives what `judge` gives for (answer, label, metadata, is_cut_off).

    `judge` gets the text after the thoughts. The reward is 0 where nothing was answered, and
    where there is no label.
    """

    def reward(
        text: str,
        label: Any,
        metadata: dict[str, Any],
        *,
        status: Status = Status.COMPLETED,
        prompt: str = "",
    ) -> float:
        answer = without_thoughts(text, prompt)
        if answer is None or label is None:
            return 0.0
        return float(judge(answer, label, metadata, status is not Status.COMPLETED))

    return reward
