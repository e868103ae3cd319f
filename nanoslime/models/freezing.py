"""Which parameters are not trained, by regular expressions over Hugging Face names."""

import re
from collections.abc import Iterable, Sequence

from nanoslime.config.flags import suggest
from nanoslime.types import RunError


def frozen_names(patterns: Sequence[str], names: Iterable[str]) -> set[str]:
    """Those of the model's tensors `names` in which a pattern is found, anywhere in the name.

    Raises RunError for a pattern that is found in none of them, and where none is left to train.
    """
    names, found = list(names), set[str]()
    for pattern in patterns:
        matches = {name for name in names if re.search(pattern, name)}
        if not matches:
            short = (re.sub(r"^model\.(layers\.\d+\.)?|\.weight$", "", name) for name in names)
            hint = suggest(pattern, {name: name for name in short})
            raise RunError(f"training.freeze: {pattern!r} is found in no tensor of the model{hint}")
        found |= matches
    if len(found) == len(names):
        raise RunError(
            f"training.freeze={list(patterns)} leaves none of {len(names)} tensors to train"
        )
    return found
