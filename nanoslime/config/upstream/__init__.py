"""Names of the options that Megatron and SGLang take, known without importing either.

A typo is thus found on the login node. The lists come from the sources of the installed
packages; `python -m tools.option_names` writes them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nanoslime.config.flags import suggest
from nanoslime.types import RunError


def _set_by_nanoslime() -> dict[str, dict[str, str]]:
    """For each group of options: option -> what a user sets instead."""
    text = Path(__file__).with_name("set_by_nanoslime.yaml").read_text(encoding="utf-8")
    found = {}
    for which, names_by_setting in yaml.safe_load(text).items():
        found[which] = {
            name: setting for setting, names in names_by_setting.items() for name in names.split()
        }
    return found


SET_BY_NANOSLIME = _set_by_nanoslime()


def check(which: str, place: str, options: Mapping[str, Any]) -> None:
    """Raises RunError for an option that the package does not have, or that nanoslime sets."""
    set_by_nanoslime = SET_BY_NANOSLIME[which]
    listed = known(which)
    for name in options:
        if name in set_by_nanoslime:
            raise RunError(f"{place}.{name} is set by nanoslime; use {set_by_nanoslime[name]}")
        if name not in listed["names"]:
            hint = suggest(name, {known_name: known_name for known_name in listed["names"]})
            raise RunError(
                f"{place}.{name}: {listed['package']} {listed['version']} has no such option{hint}"
            )


def list_file(which: str) -> Path:
    return Path(__file__).with_name(f"{which}.json")


def known(which: str) -> dict[str, Any]:
    """The committed list: package, version, names."""
    return json.loads(list_file(which).read_text(encoding="utf-8"))
