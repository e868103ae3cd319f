"""1 where the choice that a response names is that of the label, else 0.

The label is a letter, the index of a choice in metadata["choices"], counted from 0, or the text
of one of these. `choices` is a list of texts, or {"label": letters, "text": texts} as ARC has
it. Any other label has to be the response as it is.
"""

import re
from typing import Any

from nanoslime.rollout.rewards.math_answer import complete_part, marked
from nanoslime.rollout.rewards.thoughts import without_thoughts
from nanoslime.types import Status

# A letter alone: "(C)", "**C**", "\text{C}"; not the first of several.
_OPENING = r"(?:\\[a-zA-Z]+\s*\{|[\s*_$(\[{\"'`:=-])*"
_ONE = (
    rf"{_OPENING}([A-Z])(?![\w'’-])"
    r"(?!\W*(?:(?:,|/|&|\bor\b|\band\b)\W*)+(?:option\s+|choice\s+)?[A-Z](?![\w'’]))"
)
_VERB = r"(?:\s+(?:is|are|was|be|would\s+be|should\s+be|must\s+be|seems\s+to\s+be))?"
_NOUN = r"(?:\s+(?:option|choice|answer|letter))?"
_MARKED = re.compile(rf"\W*(?i:option|choice|answer)?{_ONE}")
# What says most comes first; of equals the last one counts.
_STATED = (
    re.compile(
        rf"\b(?i:answer(?:\s+(?:to|for)\s+[^.\n:]{{1,80}}?)?{_VERB}(?:\s+(?:indeed|therefore))?{_NOUN})"
        rf"{_ONE}"
    ),
    re.compile(rf"\b(?i:option|choice|choose|select|pick)(?i:{_VERB}{_NOUN}){_ONE}"),
    re.compile(r"(?<![\w'’])\(?([A-Z])\)?\s+is\s+(?:the\s+)?(?:correct|right|best)\b"),
    re.compile(r"\(([A-Z])\)|^[ \t*]*([A-Z])(?:[).:](?=\s)|[\s*.)]*$)", re.MULTILINE),
)
_TAIL = 2000


def reward(
    text: str,
    label: Any,
    metadata: dict[str, Any],
    *,
    status: Status = Status.COMPLETED,
    prompt: str = "",
) -> float:
    """Of a response that was cut off, the last line does not count."""
    response = without_thoughts(text, prompt)
    if response is None or label is None:
        return 0.0
    if status is not Status.COMPLETED:
        response = complete_part(response)
    choices = _by_letter(metadata.get("choices"))
    wanted = _letter_of(label, choices)
    if wanted is None:
        return float(response.strip() == str(label).strip())
    return float(chosen(response, choices) == wanted)


def chosen(response: str, choices: dict[str, str]) -> str | None:
    """The letter that a response names, or that of the choice whose text it is."""
    answer = marked(response)
    if answer is not None:
        found = _MARKED.match(answer)
        return found.group(1) if found else _with_text(answer, choices)
    tail = response[-_TAIL:]
    for pattern in _STATED:
        matches = list(pattern.finditer(tail))
        if matches:
            return matches[-1][matches[-1].lastindex or 1]
    return _with_text(response, choices)


def _by_letter(choices: Any) -> dict[str, str]:
    """Texts by letter."""
    if isinstance(choices, dict):
        return dict(zip(map(str, choices["label"]), map(str, choices["text"]), strict=False))
    return {chr(ord("A") + i): str(text) for i, text in enumerate(choices or ())}


def _letter_of(label: Any, choices: dict[str, str]) -> str | None:
    letters = list(choices)
    if isinstance(label, int) and label < len(letters):
        return letters[label]
    letter = re.fullmatch(r"\W*([A-Za-z])\W*", str(label))
    return letter.group(1).upper() if letter else _with_text(str(label), choices)


def _with_text(text: str, choices: dict[str, str]) -> str | None:
    """The letter of the choice with this text, but for case, spaces and full stop."""
    wanted = _folded(text)
    return next((letter for letter in choices if _folded(choices[letter]) == wanted), None)


def _folded(text: str) -> str:
    return " ".join(text.split()).rstrip(". ").casefold()
