"""1 where the final answer of a worked solution is the label's, else 0.

The final answer is the text after the last "####" (GSM8K, arXiv:2110.14168), else in
the last \\boxed{...}, else the last number of the text. Numbers are compared by value.
Labels may be worked solutions themselves, as in GSM8K.
"""

import re
from decimal import Decimal, InvalidOperation
from typing import Any

_MARK = "####"
_BOXED = "\\boxed{"
_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?")
_FRACTION = re.compile(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}")
# LaTeX spacing, \left and \right, currency and percent signs, white space, and
# \text{...}.
_NOISE = re.compile(r"\\[!,;: ]|\\(?:left|right|%|\$)|[$%\s]|\\text\{[^{}]*\}")
_THOUSANDS_SEPARATOR = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def reward(text: str, label: Any, metadata: dict[str, Any]) -> float:
    answer = final_answer(text)
    wanted = final_answer(str(label))
    if answer is None or wanted is None:
        return 0.0
    return float(_equal(answer, wanted))


def final_answer(text: str) -> str | None:
    """The answer as written, or None where the text holds none."""
    if _MARK in text:
        return _answer_after_mark(text)
    start = text.rfind(_BOXED)
    if start >= 0:
        return _before_closing_brace(text[start + len(_BOXED) :])
    numbers = _NUMBER.findall(text)
    if numbers:
        return numbers[-1]
    return text.strip() or None


def _answer_after_mark(text: str) -> str | None:
    """The number with which the rest of the line begins, else the whole of it."""
    _, _, rest = text.rpartition(_MARK)
    lines = rest.strip().splitlines()
    if not lines:
        return None
    line = lines[0].strip()
    number = _NUMBER.match(line.lstrip("$ "))
    if number:
        return number.group()
    return line or None


def _before_closing_brace(text: str) -> str | None:
    """The text before the brace that closes an already open one; None when that never closes."""
    depth = 1
    for i, character in enumerate(text):
        if character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
        if depth == 0:
            return text[:i].strip()
    return None


def _equal(left: str, right: str) -> bool:
    left = _normal_form(left)
    right = _normal_form(right)
    if left == right:
        return left != ""
    left_value = _value(left)
    return left_value is not None and left_value == _value(right)


def _normal_form(text: str) -> str:
    """The text with plain fractions, and without noise, thousands separators and a full stop."""
    with_fractions = _FRACTION.sub(r"\1/\2", text)
    without_noise = _NOISE.sub("", with_fractions)
    return _THOUSANDS_SEPARATOR.sub("", without_noise.rstrip("."))


def _value(text: str) -> Decimal | None:
    """The value of a number or a fraction; None for any other text."""
    numerator, slash, denominator = text.partition("/")
    try:
        if slash:
            return Decimal(numerator) / Decimal(denominator)
        return Decimal(numerator)
    except (InvalidOperation, ZeroDivisionError):
        return None
