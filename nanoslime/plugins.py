"""Plug-in tables hold strings "package.module:Name"; this is the one function that turns such a string into
an object.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any


def resolve(name: str, table: Mapping[str, str], what: str) -> Any:
    """The object that `name` stands for: a key of `table`, or itself a "package.module:Name".

    Raises ValueError naming the valid choices for an unknown key, or what could not be imported.
    """
    target = table.get(name, name)
    module, colon, attribute = target.partition(":")
    if not colon:
        raise ValueError(
            f'{what}={name!r} is unknown; choose one of {", ".join(sorted(table))}, or "package.module:name"'
        )
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        raise ValueError(f"{what}={name!r}: cannot load {target}: {e}") from e
