"""How a group of knobs is declared: a frozen pydantic dataclass that refuses unknown names."""

import dataclasses
import re
from math import ceil
from typing import Annotated, Any, cast, dataclass_transform

from pydantic import BeforeValidator, ConfigDict, ValidationInfo
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(
    extra="forbid", validate_default=True, allow_inf_nan=False, coerce_numbers_to_str=True
)
_TIME = re.compile(r"(?:(\d+)-)?(\d+(?::\d+){0,2})")
# What the variables of secrets are called.
SECRET_NAME = r"\w*(?:TOKEN|API_KEY|SECRET\w*|PASSWORD)"
# The options of sbatch that take yes or no as their value.
_YES_OR_NO = ("kill-on-invalid-dep",)
_SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass_transform(kw_only_default=True, frozen_default=True)
def knobs[T](cls: type[T]) -> type[T]:
    """Make `cls` a group of knobs.

    Its fields are keyword-only, frozen and validated. Unknown keys, nan and inf are refused.
    """
    made = dataclass(cls, frozen=True, kw_only=True, config=_STRICT)
    return cast(type[T], made)


@dataclasses.dataclass(frozen=True, slots=True)
class FilePath:
    """Marks a text as a path of the machine that submits: `~` and $NAME in it are put in, and
    one in a YAML file is relative to that file.

    may_be_name: OWNER/NAME is one of a hub where there is no such path beside the file.
    """

    may_be_name: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Expanded:
    """Marks a text that no shell reads after us: `~` at its beginning or behind a colon and $NAME
    are put in where the run is submitted."""


PathText = Annotated[str, FilePath()]
Text = Annotated[str, Expanded()]
PathOrName = Annotated[str, FilePath(may_be_name=True)]


def minutes(time: str) -> int:
    """The minutes of a time in one of the forms of sbatch --time. Raises ValueError for others."""
    found = _TIME.fullmatch(time.strip())
    if found is None:
        raise ValueError(
            f"{time!r} is no time; write minutes (240), HOURS:MINUTES:SECONDS (4:00:00) or "
            "DAYS-HOURS (1-12)"
        )
    days, clock = found.groups()
    numbers = [int(number) for number in clock.split(":")]
    if days is None and len(numbers) < 3:
        # MINUTES or MINUTES:SECONDS
        numbers.insert(0, 0)
    hours, whole_minutes, seconds = (numbers + [0, 0])[:3]
    return (int(days or 0) * 24 + hours) * 60 + whole_minutes + ceil(seconds / 60)


def _as_minutes(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, str) or value.isdecimal():
        return value
    try:
        return minutes(value)
    except ValueError as error:
        raise ValueError(f"cluster.{info.field_name}={error}") from None


def _sbatch_options(options: Any) -> Any:
    """The options, of which a switch has an empty value; one that is off is left out."""
    if not isinstance(options, dict):
        return options
    found = {}
    for name, value in options.items():
        text = str(value).lower()
        if name in _YES_OR_NO or text not in _SWITCHES:
            found[name] = value
        elif _SWITCHES[text]:
            found[name] = ""
    return found


Minutes = Annotated[int, BeforeValidator(_as_minutes)]
SbatchOptions = Annotated[dict[str, Text], BeforeValidator(_sbatch_options)]
