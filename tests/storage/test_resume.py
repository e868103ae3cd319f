"""A run with checkpoints goes on through its prompts in the order in which it began."""

from pathlib import Path
from typing import Any

import pytest

from nanoslime.config import RunConfig
from nanoslime.storage.resume import check_resumed
from nanoslime.types import RunError

SOURCES = [{"prompts": "a.jsonl", "weight": 3}, {"prompts": "b.jsonl"}]
BEFORE = {"seed": 3, "data": {"sources": SOURCES}}


def of(values: dict[str, Any]) -> RunConfig:
    return RunConfig(**values)


@pytest.mark.parametrize(
    ("now", "says"),
    [
        ({"seed": 4, "data": {"sources": SOURCES}}, "by seed=3 and data.shuffle=True: leave both"),
        (
            {"seed": 3, "data": {"sources": SOURCES, "shuffle": False}},
            "by seed=3 and data.shuffle=True: leave both",
        ),
        ({"seed": 3, "data": {"sources": SOURCES[::-1]}}, "{'a': 3.0, 'b': 1.0}, and {'b': 1.0"),
        ({"seed": 3, "data": {"sources": SOURCES[:1]}}, "and {'a': 3.0} are others"),
        ({"seed": 3, "data": {"prompts": "a.jsonl"}}, "and {} are others"),
    ],
)
def test_another_order_of_the_prompts_is_refused(now: dict[str, Any], says: str) -> None:
    with pytest.raises(RunError) as refused:
        check_resumed(Path("run"), of(BEFORE), of(now), has_checkpoints=True)
    assert says in str(refused.value)
    check_resumed(Path("run"), of(BEFORE), of(now), has_checkpoints=False)


def test_the_same_order_is_taken() -> None:
    check_resumed(Path("run"), of(BEFORE), of(BEFORE), has_checkpoints=True)
