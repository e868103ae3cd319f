"""1 where the final answer of a worked solution is the label's mathematics, else 0.

    response -> without its thoughts -> final answer -> the same text or number, or math-verify

The final answer of a response is what stands in its last <answer>, after its last "####" (GSM8K,
arXiv 2110.14168) or in its last \\boxed{...}; without any, what follows its last "answer is" or
"answer:", else its last formula or number. "####" may begin a headline, too: "#### Step 1" is no
answer. A label is the answer itself, unless it has "####" or a box.
"""

import re
from decimal import Decimal
from functools import lru_cache
from typing import Any

from nanoslime.rollout.rewards.math_judge import MathJudge
from nanoslime.rollout.rewards.thoughts import of_answer

# The answers of the data sets are shorter; a longer text is not parsed.
MAX_ANSWER = 400
# An answer without a mark is looked for in the last characters of a response.
_TAIL = 2000

_MARK = "####"
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
# A headline in front of steps, and one in front of the answer.
_STEP = re.compile(
    r"\W*(?:(?:step|part|case|stage|phase|section|method|approach|solution|calculations?|problem"
    r"|question|explanation|reasoning|analysis|verif\w*|check\w*|conclusion|summary|note)\b"
    r"|\d+[.)]\s+[a-zA-Z])",
    re.IGNORECASE,
)
_ANNOUNCED = re.compile(
    r"\W*(?:the\s+)?(?:final\s+|correct\s+)?(?:answer|result)\W*", re.IGNORECASE
)
# So many headlines at most are passed over.
_MAX_HEADLINES = 50
_ANSWER_IS = re.compile(r"\banswer\b[^\n.:$\\]{0,80}?(?:\bis\b:?|:|=)", re.IGNORECASE)
# What a marked answer may begin with: "Total cost:", "Therefore, the sum is", "=".
_LEAD = re.compile(r"(?:[a-zA-Z]{2,}[,']?\s+)*[a-zA-Z]{2,}(?:\s+is|\s*:|\s+=)\s+|=\s*")
_DIGITS = r"\d+(?::\d+)+|(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = rf"(?:(?<![\d)])-)?(?:\\?\$)?(?:{_DIGITS})(?:/\d+)?(?!\w|\^)(?:\s?\\?%)?"
# In $...$ two letters in a row belong to a command or to the argument of one. The text between
# two prices is no formula.
_IN_DOLLARS = r"\\[a-zA-Z]+\s*\{[^{}$]*\}|\\[a-zA-Z]+|\\.|[^$\n\\a-zA-Z]|[a-zA-Z](?![a-zA-Z])"
_FORMULA = (
    rf"\$\$.+?\$\$|\\\[.+?\\\]|\\\(.+?\\\)|\$(?>{_IN_DOLLARS})++\$"
    r"|-?\\[dt]?frac\{[^{}]*\}\{[^{}]*\}"
)
# Words that carry on with the mathematics of a number, as units do not.
_MATH_WORDS = r"(?:and|or|pi|sqrt|sin|cos|tan|log|ln|mod|choose|times|over|plus|minus)\b"
# Where the next sentence or a remark begins: ". I hope", " (not".
_NEXT = rf"(?:[.!?]\s+[AI]\s|\s+\((?!{_MATH_WORDS})[a-zA-Z]{{2}})"
_LEADING = re.compile(
    rf"{_FORMULA}|{_NUMBER}(?={_NEXT}|[.,;:!]?\s+(?!{_MATH_WORDS})[a-zA-Z]{{2}})", re.DOTALL
)
_ANYWHERE = re.compile(rf"{_FORMULA}|(?<![\w^{{.])(?:{_NUMBER})", re.DOTALL)
_SENTENCE_END = re.compile(rf"{_NEXT}|[.!?,;]\s+(?=[a-zA-Z]{{2}})|[.!?]?\n")
_UNIT = re.compile(
    rf"(?<=[\d}}%)])\s*(?!{_MATH_WORDS})[a-zA-Z]{{2,}}(?:[\s/.-]+[a-zA-Z]+)*(?:\^\{{?\d\}}?)?$"
    r"|(?<=\S)(?:\\[,;!: ]|~|\s)*\\(?:text|textbf|textrm|mathrm|mbox)\s*\{[^{}]*\}(?:\^\{?\d\}?)?$"
)
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
# Spacing, sizes, currency, percent and degrees do not make another answer.
_NOISE = re.compile(r"\\[!,;: ]|\\(?:left|right)(?![a-z])|\\?[$%]|\^\{?\\circ\}?|[\s~]")
_THOUSANDS_SEPARATOR = re.compile(r"(?<=\d)(?:,|,\\!|\{,\}|\\[,;: ]|~|\s)(?=\d{3}(?!\d))")
_MIXED_NUMBER = re.compile(r"(?<![\d.])(\d+)\s+(\d+/\d+)")
_PLAIN_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)")
_BASE = re.compile(r"_\{?(\d+)\}?$")
_SYMBOLS = {
    "−": "-",
    "×": "\\times ",
    "π": "\\pi ",
    "°": "^\\circ ",
    "∞": "\\infty ",
    "∅": "\\emptyset ",
    "\\varnothing": "\\emptyset ",
    "·": "\\cdot ",
    "½": "\\frac{1}{2}",
    "²": "^2",
    "³": "^3",
}

_judge = MathJudge()


@of_answer
def reward(response: str, label: Any, metadata: dict[str, Any], is_cut_off: bool) -> float:
    """An unfinished thought is no answer, nor is the end of a response that was cut off."""
    answer = final_answer(response, cut_off=is_cut_off)
    wanted = label_answer(str(label))
    return bool(answer and wanted) and same_answer(wanted, answer)


def label_answer(label: str) -> str:
    """The answer of a worked solution that marks it; any other label is an answer."""
    answer = marked(label)
    return _cleaned(label if answer is None else answer)


def final_answer(text: str, *, cut_off: bool = False) -> str:
    """The answer as written, without lead-in, unit and full stop; "" where the text has none.

    The last line of a text that was `cut_off` says nothing unless it holds a whole box.
    """
    if cut_off:
        text = complete_part(text)
    answer = marked(text)
    if answer is not None:
        return _cleaned(answer)
    tail = text[-_TAIL:]
    lead_ins = list(_ANSWER_IS.finditer(tail))
    if lead_ins:
        stated = tail[lead_ins[-1].end() :].lstrip(" *\n")
        leading = _LEADING.match(stated)
        phrase = leading.group() if leading else _SENTENCE_END.split(stated, maxsplit=1)[0]
        if leading or not _ANYWHERE.search(stated) or re.match(r"[^a-zA-Z]|[a-zA-Z]\b", phrase):
            return _cleaned(phrase)
    found = _ANYWHERE.findall(tail)
    if found and not cut_off:
        return _cleaned(found[-1])
    return _cleaned(tail) if not found else ""


def complete_part(text: str) -> str:
    """A text that was cut off, without its last line, unless that holds a whole box."""
    before, _, last_line = text.rpartition("\n")
    return text if _in_last_box(last_line) else before


def marked(text: str) -> str | None:
    """What the text marks as its answer; None where it marks nothing.

    A line "####" without a digit is a heading where a box is in front of it; with a box behind
    it, any line is.
    """
    tags = _TAG.findall(text)
    if tags:
        answer = marked(tags[-1])
        return tags[-1] if answer is None else answer
    end = len(text)
    for _ in range(_MAX_HEADLINES):
        start = text.rfind(_MARK, 0, end)
        if start < 0:
            break
        line, _, following = text[start + len(_MARK) : end].strip().partition("\n")
        if end == len(text):
            boxed = _in_last_box(text[start:])
            if boxed is not None:
                return boxed
        end = start
        if _ANNOUNCED.fullmatch(line) and following.strip():
            return final_answer(following)
        if _STEP.match(line):
            continue
        boxed = None if re.search(r"\d", line) else _in_last_box(text[:start])
        return line if boxed is None else boxed
    return _in_last_box(text)


def _in_last_box(text: str) -> str | None:
    """What the last box holds, "" where it never closes; None without a box."""
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    start = boxes[-1].end()
    depth = 1
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start:i]
    return ""


def _cleaned(answer: str) -> str:
    """Without what surrounds an answer: "Answer:", emphasis, dollars, a full stop and a unit."""
    if len(answer) > MAX_ANSWER:
        return ""
    for symbol, latex in _SYMBOLS.items():
        answer = answer.replace(symbol, latex)
    answer = re.sub(r"√\s*(\d+|\w)", r"\\sqrt{\1}", answer)
    lead_in = _ANSWER_IS.search(answer)
    if lead_in:
        answer = answer[lead_in.end() :]
    answer = answer.lstrip(" \t\n*`}").rstrip(" \t\n*`.")
    lead = _LEAD.match(answer)
    if lead:
        answer = answer[lead.end() :].lstrip(" *")
    for opening, closing in (("\\(", "\\)"), ("\\[", "\\]"), ("$", "$"), ("$", "$")):
        if answer.startswith(opening) and answer.endswith(closing):
            answer = answer[len(opening) : -len(closing) or None].strip()
    answer = answer.rstrip(". \\")
    return _UNIT.sub("", answer).strip()


@lru_cache(maxsize=100_000)
def same_answer(label: str, answer: str) -> bool:
    """Whether two cleaned answers are the same: as text, as numbers, or for math-verify."""
    wanted = _as_text(label)
    given = _as_text(answer)
    if wanted == given:
        return bool(wanted)
    is_percent = "%" in label + answer
    if _PLAIN_NUMBER.fullmatch(wanted) and _PLAIN_NUMBER.fullmatch(given) and not is_percent:
        return Decimal(wanted) == Decimal(given)
    # To math-verify a word is the product of its letters.
    if len(wanted) > 3 and wanted.isalpha():
        return wanted.casefold() == given.casefold().strip('"“”.!')
    bases = _BASE.findall(wanted) + _BASE.findall(given)
    if len(set(bases)) > 1:
        return False
    return _judge.same(_for_judge(label), _for_judge(answer))


def _as_text(answer: str) -> str:
    """The answer as one word, to be compared with another one."""
    text = re.sub(r"\\[dtc]frac", r"\\frac", plain(answer))
    choice = re.fullmatch(r"\(?([A-Z])\)?", text)
    return choice.group(1) if choice else text


def plain(answer: str) -> str:
    """Without text commands, spaces, currency, percent, degrees and thousands separators."""
    return _NOISE.sub("", _plain_numbers(_TEXT.sub(r"\1", answer)))


def _plain_numbers(answer: str) -> str:
    """10,080 as 10080, but (10,080) is a pair; 1 1/2 as a sum."""
    if not re.search(r"[(\[]|\\\{", answer):
        answer = _THOUSANDS_SEPARATOR.sub("", answer)
    return _MIXED_NUMBER.sub(r"(\1+\2)", answer)


def _for_judge(answer: str) -> str:
    """With the spaces and commands that math-verify needs: 6+9i, 2 pi, 4.5e33."""
    answer = _plain_numbers(answer)
    answer = re.sub(r"(?<=\d)i\b", " i", answer)
    answer = re.sub(r"(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi ", answer)
    return re.sub(r"(?<=\d)[eE]([+-]?\d+)(?![\w.])", r" \\times 10^{\1}", answer)
