"""The one place where a module is imported by name: plug-in tables hold strings
"package.module:Name".
"""

import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from nanoslime.types import RunError

_PLACE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class PluginError(RunError, ValueError):
    """A setting names what is not there. pydantic takes it for a rule's refusal."""


def target(name: str, table: Mapping[str, str], setting: str) -> str:
    """The "package.module:Name" that `name` stands for: a key of `table`, or itself such a
    string.

    Raises PluginError that names the valid choices where `name` is neither. `setting` is
    what errors call it.
    """
    found = table.get(name, name)
    if not _PLACE.fullmatch(found):
        known = ", ".join(sorted(table))
        raise PluginError(
            f'{setting}={name!r} is unknown; choose one of {known}, or "package.module:name"'
        )
    return found


def resolve(name: str, table: Mapping[str, str], setting: str) -> Any:
    """The object that `target` names. Raises PluginError as `target` does, or where it
    cannot be imported.
    """
    place = target(name, table, setting)
    module, _, attribute = place.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        raise PluginError(f"{setting}={name!r}: cannot load {place}: {e}") from e
