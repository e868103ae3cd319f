"""1 where the choice that a response names is that of the label, else 0.

The label is a letter, alone or as a response may name it ("B. Rome"), or the index, counted from
0, or the text of one of metadata["choices"]. Any other label has to be the response as it is.
"""

import re
from collections.abc import Sequence
from typing import Any

from nanoslime.rollout.rewards.math_answer import MAX_ANSWER, complete_part, final_answer, marked
from nanoslime.rollout.rewards.thoughts import of_answer

_TAIL = 2000

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# A letter alone, also as "(C)", "'C'", "**C**" or "\text{C}", and not the first of several.
_ONE = (
    r"(?:\\[a-zA-Z]+\s*\{|\\?[(\[]|[\s*_${\"'`:：=-])*([A-Z])(?![\w-]|['’]\w)"
    r"(?!\W*(?:[,/&]|\b(?:or|and)\b)\W*(?:option\s+|choice\s+)?[A-Z](?![\w'’]|\s+(?:is|was)\b))"
)
_IS = (
    r"(?:\s+(?:is|are|was|(?:must|should|would|seems\s+to)\s+be)(?:\s+(?:indeed|therefore))?)?"
    r"(?:\s+(?:option|choice|answer|letter))?"
)
_MARKED = re.compile(rf"\W*(?i:option|choice|answer)?{_ONE}")
# What says most comes first; of equals the last one counts.
_STATED = (
    re.compile(rf"\b(?i:answer(?:\s+(?:to|for)\s+[^.\n:]{{1,80}}?)?{_IS}){_ONE}"),
    re.compile(rf"\b(?i:(?:option|choice|choose|select|pick){_IS}){_ONE}"),
    re.compile(r"(?<![\w'’])\(?([A-Z])\)?\s+is\s+(?:the\s+)?(?:correct|right|best)\b"),
    re.compile(r"(?:^[ \t*]*|\()([A-Z])(?:\)|[.:](?=\s)|[\s*.!]*$)", re.MULTILINE),
)


@of_answer
def reward(response: str, label: Any, metadata: dict[str, Any], is_cut_off: bool) -> float:
    """Of a response that was cut off, the last line does not count."""
    if is_cut_off:
        response = complete_part(response)
    choices = [str(choice) for choice in metadata.get("choices") or ()]
    if isinstance(label, int) and 0 <= label < len(choices):
        wanted: str | None = _LETTERS[label]
    else:
        letter = re.fullmatch(r"\W*([A-Za-z])\W*", str(label))
        wanted = letter.group(1).upper() if letter else _letter_of(str(label), choices)
        wanted = wanted or chosen(str(label), choices)
    if wanted is None:
        return response.strip() == str(label).strip()
    return chosen(response, choices) == wanted


def chosen(response: str, choices: Sequence[str]) -> str | None:
    """The letter that a response names, or that of the choice whose text it is."""
    answer = marked(response)
    if answer is not None:
        found = _MARKED.match(answer.strip()[:MAX_ANSWER])
        return found.group(1) if found else _letter_of(answer, choices)
    tail = response[-_TAIL:]
    for pattern in _STATED:
        letters = pattern.findall(tail)
        if letters:
            return letters[-1]
    return _letter_of(response, choices) or _letter_of(final_answer(response), choices)


def _letter_of(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the choice with this text, but for case, spaces and full stop."""
    folded = [" ".join(one.split()).rstrip(". ").casefold() for one in (*choices, text)]
    position = folded.index(folded[-1])
    return _LETTERS[position] if position < len(choices) else None
