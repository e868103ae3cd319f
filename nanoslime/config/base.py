"""How a group of knobs is declared: a frozen pydantic dataclass that refuses unknown names."""

from __future__ import annotations

from typing import TypeVar, dataclass_transform

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass


T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def knobs(cls: type[T]) -> type[T]:
    """Class decorator: keyword-only, frozen, validated, unknown keys refused."""
    return dataclass(cls, frozen=True, kw_only=True, config=ConfigDict(extra="forbid", validate_default=True))
