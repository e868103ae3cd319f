"""1 where the final answer of a worked solution is the label's, else 0; numbers are compared by value.

The final answer is what follows the last "####" (GSM8K, arXiv:2110.14168), else the last \\boxed{...}, else
the last number of the text. Labels may be worked solutions themselves, as in GSM8K.
"""

import re
from decimal import Decimal, InvalidOperation
from typing import Any

_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?")
_NOISE = re.compile(r"\\[!,;: ]|\\(?:left|right|%|\$)|[$%\s]|\\text\{[^{}]*\}")
_FRACTION = re.compile(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}")


def reward(text: str, label: Any, metadata: dict[str, Any]) -> float:
    answer, wanted = final_answer(text), final_answer(str(label))
    return float(answer is not None and wanted is not None and _equal(answer, wanted))


def final_answer(text: str) -> str | None:
    """The answer as written, or None where the text holds none."""
    if "####" in text:
        line = (text.rpartition("####")[2].strip().splitlines() or [""])[0].strip()
        number = _NUMBER.match(line.lstrip("$ "))
        return number.group() if number else line or None
    if (start := text.rfind("\\boxed{")) >= 0:
        return _balanced(text[start + len("\\boxed{") :])
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else text.strip() or None


def _balanced(text: str) -> str | None:
    """What stands before the brace that closes an already open one; None when it never closes."""
    depth = 1
    for i, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:i].strip()
    return None


def _equal(left: str, right: str) -> bool:
    left, right = _normal(left), _normal(right)
    if left == right:
        return bool(left)
    a, b = _value(left), _value(right)
    return a is not None and a == b


def _normal(text: str) -> str:
    """Without LaTeX spacing, currency and percent signs, thousands separators, \\text and a full stop."""
    text = _NOISE.sub("", _FRACTION.sub(r"\1/\2", text)).rstrip(".")
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)


def _value(text: str) -> Decimal | None:
    numerator, slash, denominator = text.partition("/")
    try:
        return Decimal(numerator) / Decimal(denominator) if slash else Decimal(numerator)
    except (InvalidOperation, ZeroDivisionError):
        return None
