"""Plug-in tables hold strings "package.module:Name"; this is the one function that turns such a string into
an object.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any


def target(name: str, table: Mapping[str, str], what: str) -> str:
    """The "package.module:Name" that `name` stands for: a key of `table`, or itself such a string.

    Raises ValueError naming the valid choices for an unknown key.
    """
    found = table.get(name, name)
    if ":" not in found:
        known = ", ".join(sorted(table))
        raise ValueError(
            f'{what}={name!r} is unknown; choose one of {known}, or "package.module:name"'
        )
    return found


def resolve(name: str, table: Mapping[str, str], what: str) -> Any:
    """The object that `target` names. Raises ValueError as it does, or for what cannot be imported."""
    place = target(name, table, what)
    module, _, attribute = place.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        raise ValueError(f"{what}={name!r}: cannot load {place}: {e}") from e
