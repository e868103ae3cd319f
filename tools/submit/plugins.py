"""Whether a module that a setting names is there, which is not imported for it."""

from collections.abc import Mapping, Sequence
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from nanoslime.plugins import PluginError, target


def check_importable(
    name: str, table: Mapping[str, str], setting: str, search: Sequence[str] = ()
) -> None:
    """Raises PluginError where the module that `target` names is neither in a directory of
    `search` nor on Python's path.

    No package is imported for it: packages may need torch.
    """
    module, _, _ = target(name, table, setting).partition(":")
    first, *inner = module.split(".")
    spec = PathFinder.find_spec(first, search) or find_spec(first)
    exists = spec is not None
    places = [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
    found = first
    for word in inner:
        if exists:
            found = f"{found}.{word}"
            exists = any((p / word).is_dir() or (p / f"{word}.py").is_file() for p in places)
            places = [p / word for p in places]
    if not exists:
        raise PluginError(
            f"{setting}={name!r}: there is no module {found}; "
            "start in the directory that holds it, or set PYTHONPATH"
        )
