"""The one place where a module is imported by name: plug-in tables hold strings
"package.module:Name".
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any


def target(name: str, table: Mapping[str, str], setting: str) -> str:
    """The "package.module:Name" that `name` stands for: a key of `table`, or itself such a
    string.

    Raises ValueError that names the valid choices where `name` is neither. `setting` is
    what errors call it.
    """
    found = table.get(name, name)
    if ":" not in found:
        known = ", ".join(sorted(table))
        raise ValueError(
            f'{setting}={name!r} is unknown; choose one of {known}, or "package.module:name"'
        )
    return found


def resolve(name: str, table: Mapping[str, str], setting: str) -> Any:
    """The object that `target` names. Raises ValueError as `target` does, or where it
    cannot be imported.
    """
    place = target(name, table, setting)
    module, _, attribute = place.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        raise ValueError(f"{setting}={name!r}: cannot load {place}: {e}") from e
