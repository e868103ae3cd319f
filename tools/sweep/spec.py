"""What a sweep file asks for.

    name: learning-rate          # by default the file's own name
    grid:                        # every combination of these values
      lr: [1e-6, 2e-6]
      training.num_steps_per_rollout: [1, 2]
    points:                      # and each of these; with a grid, each beside every combination
      - {kl_coef: 0.0}
      - {kl_coef: 0.01, kl_loss_type: k3}
    seeds: 3                     # 0, 1 and 2; or a list of seeds

Keys are those of recipes (section.field) or flags without their dashes. A value becomes the flag
that sets it, so that it is checked as one.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Self

from nanoslime.config.flags import ALIASES, spellings
from nanoslime.config.written import Written, read_yaml
from nanoslime.types import RunError

_KEYS = ("name", "grid", "points", "seeds")
_SEED = "seed"
# Of a run's name, which has the element's number behind it.
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{,89}"
# Each element has its own, made of the sweep's.
_TAKEN = ("name", "cluster.run_root")


@dataclass(frozen=True, slots=True)
class Element:
    """One run of a sweep."""

    index: int
    # What it has other than the sweep's other runs, as a person reads it.
    setting: str
    # None: that of the recipe.
    seed: int | None
    flags: tuple[str, ...]

    @property
    def title(self) -> str:
        seed = "" if self.seed is None else f"seed {self.seed}"
        return f"element {self.index} ({'; '.join(filter(None, (self.setting, seed)))})"


@dataclass(frozen=True, slots=True)
class Sweep:
    name: str
    elements: tuple[Element, ...]


def read(path: Path) -> Sweep:
    """The sweep of a file. Raises RunError, one sentence that names the file and the place."""
    if not path.is_file():
        raise RunError(f"cannot read the sweep file {path}: it is no file")
    content = read_yaml(path, _KEYS)
    try:
        return parse(_plain(content), path.stem)
    except RunError as error:
        raise RunError(f"{path}: {error}") from None
    except RecursionError:
        raise RunError(f"{path}: a list or mapping in it holds itself") from None


class _Float(float):
    """A number that is shown as it was written: 1e-6, and not 1e-06."""

    def __new__(cls, written: Written) -> Self:
        made = super().__new__(cls, written.value)
        made.text = written.text
        return made

    text: str

    def __repr__(self) -> str:
        return self.text


def _plain(content: Any) -> Any:
    """The values of a file."""
    if isinstance(content, Mapping):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_plain(value) for value in content]
    if not isinstance(content, Written):
        return content
    # Infinity has words of YAML's own.
    is_number = isinstance(content.value, float) and math.isfinite(content.value)
    return _Float(content) if is_number else content.value


def parse(content: Any, default_name: str) -> Sweep:
    """The sweep that a file's content describes."""
    if not isinstance(content, Mapping):
        raise RunError(f"a sweep is a mapping of {', '.join(_KEYS)}, not {content!r}")
    for key in content:
        if key not in _KEYS:
            raise RunError(
                f"unknown key {key!r}; a sweep has {', '.join(_KEYS)}, and fields to be tried "
                "stand below grid or points"
            )
    grid = _grid(content.get("grid"))
    points = _points(content.get("points"))
    if not grid and not points:
        raise RunError("nothing is tried: give grid (lists of values by field) or points, or both")
    settings = []
    for point in points or [{}]:
        for values in product(*grid.values()):
            combined = dict(zip(grid, values, strict=True))
            both = sorted(_fields(point) & _fields(combined))
            if both:
                raise RunError(f"{', '.join(both)} stands in grid and in points; leave one out")
            settings.append(point | combined)
    _refuse_equal(settings)
    elements: list[Element] = []
    for setting in settings:
        for seed in _seeds(content.get("seeds")):
            elements.append(_element(len(elements), setting, seed))
    name = content.get("name", default_name)
    if not re.fullmatch(_NAME, str(name)):
        raise RunError(
            f"name={name!r} cannot be the name of the sweep's directory: it is by default the "
            "file's name; set name to at most 90 letters, digits, dots, - and _"
        )
    return Sweep(str(name), tuple(elements))


def _refuse_equal(settings: Sequence[Mapping[str, Any]]) -> None:
    """Raises RunError where two settings are one, whatever the names of their fields."""
    known: dict[str, Mapping[str, Any]] = {}
    for setting in settings:
        by_field = sorted((_field(str(key)), repr(_same(value))) for key, value in setting.items())
        equal = known.setdefault(repr(by_field), setting)
        if equal is not setting:
            raise RunError(
                f"{_words(setting) or 'a point without fields'} stands twice in points; more runs "
                "of it are more seeds"
            )


def _same(value: Any) -> Any:
    """What equal values have in common: 1e-6, "1e-6" and 0.000001 are one number."""
    text = _text(value)
    try:
        return float(text)
    except ValueError:
        return text


def _grid(given: Any) -> dict[str, list[Any]]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise RunError(f"grid is a mapping of fields to lists of values, not {given!r}")
    for key, values in given.items():
        _check_key("grid", key)
        if not isinstance(values, list) or not values:
            raise RunError(f"grid.{key}={values!r} is no list of values; write [{values}]")
        same = [_same(value) for value in values]
        for value in values:
            if same.count(_same(value)) > 1:
                raise RunError(
                    f"grid.{key} has {_text(value)} twice; more runs of it are more seeds"
                )
    _refuse_two_names("grid", given)
    return dict(given)


def _points(given: Any) -> list[dict[str, Any]]:
    if given is None:
        return []
    if not isinstance(given, list) or not all(isinstance(point, Mapping) for point in given):
        raise RunError(f"points is a list of mappings of fields to values, not {given!r}")
    for number, point in enumerate(given):
        for key in point:
            _check_key(f"points[{number}]", key)
        _refuse_two_names(f"points[{number}]", point)
    return [dict(point) for point in given]


def _check_key(place: str, key: Any) -> None:
    field = _field(str(key))
    if field == _SEED:
        raise RunError(f"{place}.{key}: seeds have a place of their own; write seeds: [0, 1, 2]")
    if field in _TAKEN:
        raise RunError(f"{place}.{key}: each run of a sweep has its own {field}; leave it out")


def _refuse_two_names(place: str, given: Mapping[str, Any]) -> None:
    by_field: dict[str, str] = {}
    for key in map(str, given):
        other = by_field.setdefault(_field(key), key)
        if other != key:
            raise RunError(f"{place}: {other} and {key} are both {_field(key)}; leave one out")


def _fields(point: Mapping[str, Any]) -> set[str]:
    """The fields that a point sets, whatever their names in it."""
    return {_field(str(key)) for key in point}


def _field(key: str) -> str:
    """The field that a key stands for; an unknown key is refused later, as a flag."""
    plain = key.replace("_", "-")
    known = spellings().get(plain)
    return known.field if known else ALIASES.get(plain, key)


def _seeds(given: Any) -> Sequence[int | None]:
    if given is None:
        return [None]
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return range(given)
    is_list = isinstance(given, list) and given
    if is_list and all(isinstance(seed, int) and not isinstance(seed, bool) for seed in given):
        if len(set(given)) < len(given):
            raise RunError(f"seeds={given} names a seed twice")
        return list(given)
    raise RunError(f"seeds={given!r} is neither a positive number of seeds nor a list of seeds")


def _element(index: int, setting: Mapping[str, Any], seed: int | None) -> Element:
    flags: list[str] = []
    for key, value in setting.items():
        flags += _flag(str(key), value)
    if seed is not None:
        flags.append(f"--seed={seed}")
    return Element(index, _words(setting), seed, tuple(flags))


def _words(setting: Mapping[str, Any]) -> str:
    """A setting as a person reads it."""
    return ", ".join(f"{key}={_text(value)}" for key, value in setting.items())


def _flag(key: str, value: Any) -> list[str]:
    """The words of a command line that set a field."""
    name = f"--{key.replace('_', '-')}"
    if isinstance(value, list):
        return [name, *map(_text, value)]
    return [f"{name}={_text(value)}"]


def _text(value: Any) -> str:
    """A value of a YAML file as a command line has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "none"
    if isinstance(value, Mapping | list):
        return json.dumps(value)
    return str(value)
