"""From YAML files and flags to one RunConfig, and from it to the file that a job reads.

    recipe.yaml  <  cluster.yaml (under `cluster:`)  <  flags

Nothing is guessed: an unknown key or a value of the wrong type is refused with its
place and the valid choices.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import TypeAdapter, ValidationError

from nanoslime.config import flags as flag_table
from nanoslime.config import upstream
from nanoslime.config.algorithm import ALGORITHM_CONFIGS, SETTINGS_OF, GRPOConfig
from nanoslime.config.rollout import ENGINES
from nanoslime.config.run import RunConfig
from nanoslime.config.training import MEGATRON_ONLY, MEGATRON_OPTIONS, PARALLEL_SIZES
from nanoslime.config.written import Written, as_field, read_yaml
from nanoslime.plugins import resolve
from nanoslime.types import RunError

_OFF = {"false", "no", "off", "none", "0", "f", "n"}


def load(
    recipe: Path | None, cluster: Path | None, flags: Sequence[str], *, resumes: bool = False
) -> RunConfig:
    """The configuration that a recipe, a cluster file and flags add up to.

    resumes: the recipe is the configuration of a run that has been accepted.

    Without a backend named anywhere, one node means FSDP2. Raises RunError, one line for each
    thing that is wrong.
    """
    layers = _layers(recipe, cluster, flags, is_of_run=resumes)
    _check_cluster_file(cluster, layers.sources)
    config = layers.validate()
    if not resumes:
        _check_kl(config)
        _check_warmup(config, layers.sources)
        _check_rehearsal_data(config)
    if _falls_back_to_fsdp(config, layers.sources):
        # The parallel sizes of a recipe do not apply to FSDP2.
        training = replace(config.training.without_megatron(), backend="fsdp")
        config = replace(config, training=training)
    for which in MEGATRON_OPTIONS:
        upstream.check(which, f"training.{which}", getattr(config.training, which))
    for engine in dict.fromkeys([*ENGINES, config.rollout.engine]):
        _check_engine_options(engine, config)
    return config


def set_by(
    recipe: Path | None, cluster: Path | None, flags: Sequence[str], *, resumes: bool = False
) -> dict[str, str]:
    """By the name of each field that `load` finds set: the file, or "flag --name"."""
    sources = _layers(recipe, cluster, flags, is_of_run=resumes).sources
    return {field: source.text for field, source in sources.items()}


def _layers(
    recipe: Path | None, cluster: Path | None, flags: Sequence[str], *, is_of_run: bool
) -> "_Layers":
    """The values of the files and flags, one over the other."""
    layers = _Layers()
    if recipe is not None:
        layers.add_file(recipe, "", is_of_run=is_of_run)
    if cluster is not None:
        layers.add_file(cluster, "cluster")
    flags_given = flag_table.parse(flags)
    flags_given = [*_switches_off_kl(flags_given), *flags_given]
    for flag in flags_given:
        if flag.field in SETTINGS_OF and str(flag.value).lower() in _OFF:
            layers.forget_settings_of(flag.field)
    for flag in flags_given:
        layers.put(flag.field, flag.value, _Source(f"flag {flag.name}", is_flag=True))
    return layers


def _switches_off_kl(flags: Sequence[flag_table.Flag]) -> list[flag_table.Flag]:
    """`--kl-loss-coef 0` alone, as `--beta 0` elsewhere, is `--no-use-kl-loss` too."""
    given = {flag.field: flag for flag in flags}
    coef = given.get("algorithm.kl_loss_coef")
    if coef is None or "algorithm.use_kl_loss" in given or not _is_zero(coef.value):
        return []
    return [flag_table.Flag(coef.name, "algorithm.use_kl_loss", "false")]


def _is_zero(text: Any) -> bool:
    try:
        return float(text) == 0
    except (TypeError, ValueError):
        return False


def _check_kl(config: RunConfig) -> None:
    """Raises RunError for a reference model that would be held for nothing."""
    if config.algorithm.use_kl_loss and not config.algorithm.kl_loss_coef:
        raise RunError(
            "algorithm.use_kl_loss with algorithm.kl_loss_coef=0 would hold a reference model that "
            "changes nothing; set kl_loss_coef above 0, or switch it off (--no-use-kl-loss)"
        )


def _check_engine_options(engine: str, config: RunConfig) -> None:
    kind = resolve(engine, ENGINES, "rollout.engine")
    if not isinstance(kind, type) or not hasattr(kind, "check_options"):
        raise RunError(
            f"rollout.engine={engine!r} is no kind of engine; "
            "name a subclass of nanoslime.engine_kind.EngineKind"
        )
    kind().check_options(config.rollout)


def dump(config: RunConfig) -> str:
    """The whole configuration as YAML; `read` gives back an equal object."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True, width=110)


def read(path: Path) -> RunConfig:
    """The configuration of a run, as `dump` wrote it. Raises RunError naming the file."""
    layers = _Layers()
    layers.add_file(path, "", is_of_run=True)
    return layers.validate()


@dataclass(frozen=True, slots=True)
class _Source:
    """The file or the flag that a value came from."""

    text: str
    is_flag: bool = False
    # To which the paths of a file are relative; None: of a flag, and where all is in its place.
    folder: Path | None = None


class _Layers:
    """Values laid over one another, and where each came from."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        # By the dotted name of the field.
        self.sources: dict[str, _Source] = {}

    def add_file(self, path: Path, section: str, *, is_of_run: bool = False) -> None:
        """Lay a YAML file over what is there, below `section`.

        is_of_run: a run's own configuration, in which all paths are in their place.
        """
        folder = None if is_of_run else path.absolute().parent
        prefix = f"{section}." if section else ""
        content = read_yaml(path, _keys_below(prefix))
        try:
            self._add(section, content, _Source(str(path), folder=folder))
        except RecursionError:
            raise RunError(f"{path}: a list or mapping in it holds itself") from None

    def _add(self, place: str, content: Any, source: _Source) -> None:
        known = flag_table.field_types()
        if place in known:
            self.put(place, content, source)
            return
        if isinstance(content, Written):
            # An empty section says nothing.
            content = {} if content.value is None else content
        if not isinstance(content, dict):
            raise RunError(
                f"{source.text}: {place or 'the file'} must be a mapping of keys to values, "
                f"not {content!r}"
            )
        prefix = f"{place}." if place else ""
        valid = _keys_below(prefix)
        for key, value in content.items():
            if key not in valid:
                hint = _hint(str(key), valid)
                if (prefix, key) == ("cluster.", "cluster"):
                    hint = "; a cluster file has the fields alone: leave the line `cluster:` out"
                raise RunError(f"{source.text}: unknown key {prefix}{key}{hint}")
            self._add(prefix + key, value, source)

    def put(self, field: str, value: Any, source: _Source) -> None:
        """Set a field. The keys of a dict field are merged one by one."""
        is_in_place = source.folder is None and not source.is_flag
        kind = flag_table.field_types(marked=not is_in_place)[field]
        try:
            value = as_field(kind, value, source.folder)
        except ValueError as error:
            raise RunError(f"{source.text}: {field}={error}") from None
        *sections, leaf = field.split(".")
        target = self.values
        for section in sections:
            target = target.setdefault(section, {})
        is_mapping = get_origin(flag_table.field_types()[field]) is dict
        if is_mapping and isinstance(value, dict):
            value = {**target.get(leaf, {}), **value}
        target[leaf] = value
        self.sources[field] = source

    def forget_settings_of(self, switch: str) -> None:
        """Take back what the files set beside a switch that a flag turns off."""
        *sections, _ = switch.split(".")
        target = self.values
        for section in sections:
            target = target.get(section, {})
        for name in SETTINGS_OF[switch]:
            target.pop(name, None)

    def validate(self) -> RunConfig:
        """Raises RunError: one line for each problem, with its place."""
        self.values.setdefault("algorithm", {}).setdefault("name", GRPOConfig.name)
        try:
            return TypeAdapter(RunConfig).validate_python(self.values)
        except ValidationError as e:
            lines = [self._line(dict(error)) for error in e.errors()]
            raise RunError("\n".join(lines)) from None

    def _line(self, error: dict[str, Any]) -> str:
        """One of pydantic's errors in one line, with the value, its source and its place."""
        kind = error["type"]
        if kind == "value_error":
            # A rule of ours; its message names its fields itself.
            return str(error["ctx"]["error"])
        place = self._place(error)
        source = self._source(place)
        field = ".".join(place)
        if kind == "unexpected_keyword_argument" and place[0] == "algorithm":
            return f"{source}: {field}: {self._not_of_this_algorithm(place[-1])}"
        if kind == "unexpected_keyword_argument":
            return f"{source}: unknown key {field}{_hint_in_list(place)}"
        if kind == "union_tag_invalid":
            return (
                f"{self.sources['algorithm.name'].text}: algorithm.name={error['ctx']['tag']!r} "
                f"is unknown; choose one of {error['ctx']['expected_tags']}"
            )
        message = error["msg"].replace("Input should be", "must be", 1)
        message = message.replace("String should match pattern", "must match", 1)
        return f"{source}: {field}={error['input']!r}: {message}"

    def _place(self, error: dict[str, Any]) -> list[str]:
        """The words of the field's dotted name."""
        place = [str(word) for word in error["loc"]]
        if place[0] == "algorithm" and error["type"] != "union_tag_invalid":
            # Without the tag by which pydantic chose the class.
            del place[1]
        return place

    def _source(self, place: list[str]) -> str:
        """The file or flag that set the field, or the nearest mapping around it."""
        for length in range(len(place), 0, -1):
            source = self.sources.get(".".join(place[:length]))
            if source is not None:
                return source.text
        return "default"

    def _not_of_this_algorithm(self, field: str) -> str:
        """For a key that another class of the union has; one that none has is refused
        on the way in."""
        having = []
        for name, algorithm in ALGORITHM_CONFIGS.items():
            if field in {f.name for f in fields(algorithm)}:
                having.append(name)
        chosen = self.values["algorithm"]["name"]
        return f"algorithm.name={chosen} has no such field; these have: {', '.join(having)}"


def _keys_below(prefix: str) -> list[str]:
    """The keys that a mapping may have whose fields' dotted names begin with `prefix`."""
    keys = set()
    for name in flag_table.field_types():
        if name.startswith(prefix):
            key, _, _ = name.removeprefix(prefix).partition(".")
            keys.add(key)
    return sorted(keys)


def _hint(key: str, valid: Sequence[str]) -> str:
    """What may be meant by an unknown key: the same key in other sections, a similar
    one, or any valid one."""
    elsewhere = [name for name in flag_table.field_types() if name.endswith(f".{key}")]
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere)}?"
    similar = flag_table.elsewhere(key, as_fields=True)
    similar = similar or flag_table.suggest(key, {name: name for name in valid})
    return similar or f"; valid here: {', '.join(valid)}"


def _hint_in_list(place: Sequence[str]) -> str:
    """What may be meant by an unknown key of one of a list's sections, LIST.INDEX.KEY."""
    [section] = get_args(flag_table.field_types()[".".join(place[:-2])])
    names = {f.name: f.name for f in fields(section)}
    return flag_table.suggest(place[-1], names) or f"; valid here: {', '.join(names)}"


def _check_cluster_file(cluster: Path | None, sources: dict[str, _Source]) -> None:
    """Raises RunError for a cluster file that leaves open whether its nodes have GPUs: without
    that a plan for CPUs would be made.
    """
    if cluster is not None and "cluster.gpus_per_node" not in sources:
        raise RunError(
            f"{cluster}: gpus_per_node is not set; write how many GPUs each node has, or "
            "`gpus_per_node: 0` where there are none"
        )


def _check_warmup(config: RunConfig, sources: dict[str, _Source]) -> None:
    """Raises RunError for a run that would end before its learning rate has risen.

    A flag may shorten the run of a recipe to try it out; its warm-up then stays as it is.
    """
    warmup = config.training.lr_warmup_steps
    steps = config.rollout.num_rollout * config.training.num_steps_per_rollout
    fields = ("rollout.num_rollout", "training.lr_warmup_steps")
    length, of_warmup = [sources.get(field) for field in fields]
    is_shortened = length is not None and length.is_flag and not (of_warmup and of_warmup.is_flag)
    if config.rollout.rollout_only or is_shortened or warmup <= steps:
        return
    raise RunError(
        f"training.lr_warmup_steps={warmup} is longer than the run of {steps} optimizer steps "
        "(rollout.num_rollout times training.num_steps_per_rollout); lower it"
    )


def _check_rehearsal_data(config: RunConfig) -> None:
    """Raises RunError for prompts that a rehearsal would leave unread."""
    for field in ("prompts", "sources", "eval_prompts"):
        given = getattr(config.data, field)
        if config.rehearsal.enabled and given:
            raise RunError(
                f"data.{field}={given!r}: a rehearsal has prompts of its own, and it is one where "
                "no model is named; add --hf-checkpoint, or leave the prompts out"
            )


def _falls_back_to_fsdp(config: RunConfig, sources: dict[str, _Source]) -> bool:
    """Whether there is one node, nobody named a backend, and nothing asks for Megatron.

    A flag for parallelism asks for it, and so do routing replay and options in
    training.megatron and its neighbours.
    """
    training = config.training
    if "training.backend" in sources or config.cluster.nodes > 1:
        return False
    has_options = any(getattr(training, which) for which in MEGATRON_OPTIONS)
    if training.routing_replay != "none" or has_options:
        return False
    for name in PARALLEL_SIZES + tuple(n for n in MEGATRON_ONLY if getattr(training, n)):
        source = sources.get(f"training.{name}")
        if source is not None and source.is_flag:
            return False
    return True
