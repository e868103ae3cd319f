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
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from nanoslime.config.flags import ALIASES, spellings
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
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise RunError(f"cannot read the sweep file {path}: {e}") from e
    except (yaml.YAMLError, ValueError) as e:
        raise RunError(f"{path} is not YAML: {' '.join(str(e).split())}") from e
    try:
        return parse(content, path.stem)
    except RunError as error:
        raise RunError(f"{path}: {error}") from None


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


def _grid(given: Any) -> dict[str, list[Any]]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise RunError(f"grid is a mapping of fields to lists of values, not {given!r}")
    for key, values in given.items():
        _check_key("grid", key)
        if not isinstance(values, list) or not values:
            raise RunError(f"grid.{key}={values!r} is no list of values; write [{values}]")
        texts = [_text(value) for value in values]
        for text in texts:
            if texts.count(text) > 1:
                raise RunError(f"grid.{key} has {text} twice; more runs of it are more seeds")
    return dict(given)


def _points(given: Any) -> list[dict[str, Any]]:
    if given is None:
        return []
    if not isinstance(given, list) or not all(isinstance(point, Mapping) for point in given):
        raise RunError(f"points is a list of mappings of fields to values, not {given!r}")
    for number, point in enumerate(given):
        for key in point:
            _check_key(f"points[{number}]", key)
    return [dict(point) for point in given]


def _check_key(place: str, key: Any) -> None:
    field = _field(str(key))
    if field == _SEED:
        raise RunError(f"{place}.{key}: seeds have a place of their own; write seeds: [0, 1, 2]")
    if field in _TAKEN:
        raise RunError(f"{place}.{key}: each run of a sweep has its own {field}; leave it out")


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
    words = [f"{key}={_text(value)}" for key, value in setting.items()]
    return Element(index, ", ".join(words), seed, tuple(flags))


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
