"""1 where the final answer of a worked solution is the number of the label, else 0.

GSM8K, arXiv 2110.14168. The final answer is found as for math_answer; units, currency and
thousands separators make no other number. Nothing is asked of math-verify, so this is quick.
"""

import re
from fractions import Fraction
from typing import Any

from nanoslime.rollout.rewards.math_answer import final_answer, label_answer, plain
from nanoslime.rollout.rewards.thoughts import of_answer

_FRACTION = re.compile(r"\\[dtc]?frac\s*\{?\s*(\d+)\s*\}?\s*\{?\s*(\d+)\s*\}?")
_NUMBER = re.compile(r"(?<![\d.)])-?(?:\d+(?:\.\d*)?|\.\d+)(?:/\d+)?")
_REMARK = re.compile(r"(?<=\S)\s*\([^()]*\)$")


@of_answer
def reward(response: str, label: Any, metadata: dict[str, Any], is_cut_off: bool) -> float:
    """An answer of several numbers, as "18 or 19", is none."""
    wanted = value(label_answer(str(label)))
    given = value(final_answer(response, cut_off=is_cut_off))
    return wanted is not None and given == wanted


def value(answer: str) -> Fraction | None:
    """The number in a cleaned answer; behind the last "=" where it is an equation."""
    _, _, right = plain(_REMARK.sub("", answer)).rpartition("=")
    numbers = _NUMBER.findall(_FRACTION.sub(r"\1/\2", right))
    try:
        return Fraction(numbers[0]) if len(numbers) == 1 else None
    except (ValueError, ZeroDivisionError):
        return None
