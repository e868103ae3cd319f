"""How a group of knobs is declared: a frozen pydantic dataclass that refuses unknown names."""

from typing import TypeVar, cast, dataclass_transform

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

T = TypeVar("T")

_STRICT = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def knobs(cls: type[T]) -> type[T]:
    """Class decorator: keyword-only, frozen, validated; unknown keys, nan and inf are refused."""
    return cast(type[T], dataclass(cls, frozen=True, kw_only=True, config=_STRICT))
