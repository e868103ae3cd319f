"""Which parameters are not trained, by regular expressions over Hugging Face names."""

import re
from collections.abc import Iterable, Sequence

from nanoslime.config.flags import suggest
from nanoslime.types import RunError


def frozen_names(patterns: Sequence[str], names: Iterable[str]) -> set[str]:
    """The tensors of a model, whose tensors are `names`, in whose name a pattern is
    found (anywhere in it).

    Raises RunError for a pattern that is found in none of them, and where no tensor is
    left to train.
    """
    all_names = list(names)
    frozen: set[str] = set()
    for pattern in patterns:
        matches = [name for name in all_names if re.search(pattern, name)]
        if not matches:
            raise RunError(
                f"training.freeze: {pattern!r} is found in no tensor of the model"
                f"{_hint(pattern, all_names)}"
            )
        frozen.update(matches)
    if len(frozen) == len(all_names):
        raise RunError(
            f"training.freeze={list(patterns)} leaves none of {len(all_names)} tensors to train"
        )
    return frozen


def _hint(pattern: str, names: list[str]) -> str:
    """A suggestion among the names, without their layer and without `.weight`."""
    short_names = [re.sub(r"^model\.(layers\.\d+\.)?|\.weight$", "", name) for name in names]
    return suggest(pattern, {name: name for name in short_names})
