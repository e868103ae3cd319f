"""The F1 of the words of a response and of its label, as SQuAD's evaluation defines it.

arXiv 1606.05250, section 6.1. Words are compared in lower case, without punctuation and without
the articles a, an and the. Of several labels the best one counts. Where a text has no words,
the value is 1 if neither has any, else 0 (SQuAD 2.0, arXiv 1806.03822).
"""

import re
import string
from collections import Counter
from typing import Any

from nanoslime.rollout.rewards.thoughts import of_answer

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


@of_answer
def reward(response: str, label: Any, metadata: dict[str, Any], is_cut_off: bool) -> float:
    """The label is a text or a list of texts. Thoughts are no part of the response."""
    labels = label if isinstance(label, list | tuple) else [label]
    given = words(response)
    return max((f1(given, words(str(one))) for one in labels if one is not None), default=0.0)


def words(text: str) -> list[str]:
    return _ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def f1(given: list[str], wanted: list[str]) -> float:
    if not given or not wanted:
        return float(given == wanted)
    num_same = (Counter(given) & Counter(wanted)).total()
    return 2 * num_same / (len(given) + len(wanted))
