"""How a group of knobs is declared: a frozen pydantic dataclass that refuses unknown names."""

from typing import cast, dataclass_transform

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def knobs[T](cls: type[T]) -> type[T]:
    """Make `cls` a group of knobs.

    Its fields are keyword-only, frozen and validated. Unknown keys, nan and inf are refused.
    """
    made = dataclass(cls, frozen=True, kw_only=True, config=_STRICT)
    return cast(type[T], made)
