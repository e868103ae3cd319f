"""What a response says after its thoughts: the part that a reward judges."""

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
