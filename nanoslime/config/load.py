"""From YAML files and flags to one RunConfig, and from RunConfig to the file that a job reads.

    recipe.yaml  <  cluster.yaml (under `cluster:`)  <  flags

Nothing is guessed: an unknown key or a value of the wrong type is refused with its place and what is valid.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import TypeAdapter, ValidationError

from nanoslime.config import flags as flag_table
from nanoslime.config import upstream
from nanoslime.config.algorithm import AnyAlgorithm, GRPOConfig
from nanoslime.config.run import RunConfig
from nanoslime.config.training import PARALLEL_SIZES
from nanoslime.types import RunError

_HELP = {"-h", "--help"}


def load(recipe: Path | None, cluster: Path | None, flags: Sequence[str]) -> RunConfig:
    """The configuration that a recipe, a cluster file and flags add up to.

    `--help` or `-h` among the flags prints every field with its value and ends the process. Without a backend
    named anywhere, one node means FSDP2. Raises RunError, one line for each thing that is wrong.
    """
    layers = _Layers()
    for path, section in ((recipe, ""), (cluster, "cluster")):
        if path is not None:
            layers.add_file(path, section)
    for flag in flag_table.parse([f for f in flags if f not in _HELP]):
        layers.put(flag.field, flag.value, f"flag {flag.name}")
    if _HELP & set(flags):
        flag_table.print_help(layers.validate(), Path(sys.argv[0]).name)
    config = _one_node_means_fsdp(layers.validate(), layers.sources)
    upstream.check("megatron", "training.megatron", config.training.megatron)
    upstream.check("sglang", "rollout.sglang", config.rollout.sglang)
    return config


def dump(config: RunConfig) -> str:
    """The whole configuration as YAML; `read` gives back an equal object."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True, width=110)


def read(path: Path) -> RunConfig:
    """The configuration of a run, as `dump` wrote it. Raises RunError naming the file."""
    layers = _Layers()
    layers.add_file(path, "")
    return layers.validate()


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping; YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for i, key in enumerate(keys) if key in keys[:i]]
        if twice:
            problem = f"key {twice[0]!r} stands twice"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


class _Layers:
    """Values laid over one another, and where each came from."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}  # dotted field -> file or flag

    def add_file(self, path: Path, section: str) -> None:
        """Lay a YAML file over what is there, below `section`."""
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
        except (OSError, UnicodeDecodeError) as e:
            raise RunError(f"cannot read {path}: {e}") from e
        except yaml.YAMLError as e:
            raise RunError(f"{path} is not YAML: {' '.join(str(e).split())}") from e
        self._add(section, content if content is not None else {}, str(path))

    def _add(self, place: str, content: Any, source: str) -> None:
        known = flag_table.field_types()
        if place in known:
            return self.put(place, content, source)
        if not isinstance(content, dict):
            where = f"{source}: {place or 'the file'}"
            raise RunError(f"{where} must be a mapping of keys to values, not {content!r}")
        prefix = f"{place}." if place else ""
        inside = {f.removeprefix(prefix).split(".")[0] for f in known if f.startswith(prefix)}
        for key, value in content.items():
            if key not in inside:
                elsewhere = [f for f in known if f.endswith(f".{key}")]
                near = f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else ""
                near = near or flag_table.suggest(str(key), {name: name for name in sorted(inside)})
                near = near or f"; valid here: {', '.join(sorted(inside))}"
                raise RunError(f"{source}: unknown key {prefix}{key}{near}")
            self._add(prefix + key, value, source)

    def put(self, field: str, value: Any, source: str) -> None:
        """Set a field. The keys of a dict field are merged one by one."""
        *sections, leaf = field.split(".")
        target = self.values
        for section in sections:
            target = target.setdefault(section, {})
        if get_origin(flag_table.field_types()[field]) is dict and isinstance(value, dict):
            value = target.get(leaf, {}) | value
        target[leaf] = value
        self.sources[field] = source

    def validate(self) -> RunConfig:
        """Raises RunError: one line for each problem, with its place."""
        self.values.setdefault("algorithm", {}).setdefault("name", GRPOConfig.name)
        try:
            return TypeAdapter(RunConfig).validate_python(self.values)
        except ValidationError as e:
            raise RunError("\n".join(self._line(dict(error)) for error in e.errors())) from None

    def _line(self, error: dict[str, Any]) -> str:
        parts = [str(part) for part in error["loc"]]
        if parts[:1] == ["algorithm"] and error["type"] != "union_tag_invalid":
            del parts[1]  # the name of the algorithm, by which pydantic chose the class
        place = ".".join(parts)
        outward = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        source = next(
            (self.sources[field] for field in outward if field in self.sources), "default"
        )
        if error["type"] == "unexpected_keyword_argument":
            return f"{source}: {place}: {self._not_of_this_algorithm(parts[-1])}"
        if error["type"] == "union_tag_invalid":
            given, choices = (
                f"algorithm.name={error['ctx']['tag']!r}",
                error["ctx"]["expected_tags"],
            )
            return f"{self.sources['algorithm.name']}: {given} is unknown; choose one of {choices}"
        message = (
            error["msg"].removeprefix("Value error, ").replace("Input should be", "must be", 1)
        )
        message = message.replace("String should match pattern", "must match", 1)
        if error["type"] == "value_error":  # a rule of ours, which names its fields itself
            return message if message.startswith(place) else f"{place}: {message}"
        return f"{source}: {place}={error['input']!r}: {message}"

    def _not_of_this_algorithm(self, field: str) -> str:
        """A key that another class of the union has; one that none has is refused on the way in."""
        classes: dict[str, Any] = {c.name: c for c in get_args(AnyAlgorithm)}
        having = [name for name, c in classes.items() if field in {f.name for f in fields(c)}]
        chosen = f"algorithm.name={self.values['algorithm']['name']}"
        return f"{chosen} has no such field; these have: {', '.join(having)}"


def _one_node_means_fsdp(config: RunConfig, sources: dict[str, str]) -> RunConfig:
    """FSDP2 where nobody named a backend and there is one node; a recipe's parallel sizes then do not apply.

    A flag for parallelism asks for Megatron, and so do routing replay and options in training.megatron.
    """
    training = config.training
    names = (*PARALLEL_SIZES, "sequence_parallel") if training.sequence_parallel else PARALLEL_SIZES
    asked = any(sources.get(f"training.{name}", "").startswith("flag ") for name in names)
    asked |= training.routing_replay != "none" or bool(training.megatron)
    if asked or "training.backend" in sources or config.cluster.nodes > 1:
        return config
    off: dict[str, Any] = dict.fromkeys(PARALLEL_SIZES, 1) | {"sequence_parallel": False}
    return replace(config, training=replace(training, backend="fsdp", **off))
