"""Command-line flags: short names that the field knows, and `--section.field` for all else.

    --tp-size 2       --tp-size=2           --training.tp-size 2
    --use-kl-loss     --no-use-kl-loss      --use-kl-loss=false
    --rollout.stop "</answer>" "Question:"  --data.chat-template-kwargs '{"enable_thinking": false}'
    --eval.sets a.jsonl,b.jsonl
    --eval.sets '{"name": "greedy", "prompts": "test.jsonl", "temperature": 0}'

The fields of `algorithm` are those of all algorithms; whether the chosen one has a
field is validated later.

A flag is only taken apart here. Its value stays text, is laid over the YAML files and
validated with them, so that a wrong value reads the same wherever it came from.
`jobs/submit_grpo.py --help` shows the flags.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from nanoslime.config.run import RunConfig
from nanoslime.types import RunError

_FLAG = re.compile(r"--([\w.-]+)")
HELP = frozenset({"-h", "--help"})
# Fields of each section whose own name is a flag, too.
_SHORT_NAMES = {
    "model": "hf_checkpoint dtype trust_remote_code",
    "training": """backend num_gpus tp_size pp_size vpp_size cp_size ep_size etp_size
        sequence_parallel allow_slow lr num_steps_per_rollout max_tokens_per_microbatch""",
    "rollout": """num_rollout rollout_batch_size n_samples_per_prompt max_new_tokens temperature
        top_p top_k engine engine_tp_size max_staleness environment environment_options
        load_rollouts rollout_only""",
    "algorithm": """eps_clip eps_clip_high eps_clip_c kl_coef use_kl_loss kl_loss_coef
        kl_loss_type use_unbiased_kl entropy_coef old_logprobs denominator normalize_advantages
        gamma""",
    "algorithm.correction": "use_tis tis_clip tis_clip_low tis_level use_opsm opsm_delta",
    "data": """prompts eval_prompts prompt_key label_key metadata_key reward chat_template
        system_prompt max_prompt_tokens""",
    "tracking": "use_tensorboard use_wandb",
    "cluster": """nodes rollout_nodes engine_gpus colocate time_limit_min run_root partition
        account qos constraint reservation exclude nodelist dependency exclusive comment mail_user
        mail_type submit resume_by""",
}
# Short names that differ from their field's name.
_OTHER_NAMES = {
    "eval-interval": "eval.interval",
    "save-interval": "checkpoint.interval",
    "algorithm": "algorithm.name",
    "advantage-estimator": "algorithm.name",
    "decoder-first-pipeline-num-layers": "training.num_layers_in_first_pipeline_stage",
    "decoder-last-pipeline-num-layers": "training.num_layers_in_last_pipeline_stage",
    "input-key": "data.prompt_key",
    "apply-chat-template-kwargs": "data.chat_template_kwargs",
    "rm-type": "data.reward",
    "rm-url": "data.reward_url",
    "rollout-stop": "rollout.stop",
    "rollout-stop-token-ids": "rollout.stop_token_ids",
}


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag as typed: the field it sets, and the value's text; None empties an
    optional field. Of a list it is the items' texts, of a dict what its JSON holds."""

    name: str
    field: str
    value: str | list[str] | dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Spelling:
    """What the name of a flag stands for."""

    field: str
    # Of a switch that other frameworks know: the field's values for "true" and "false".
    on: str = ""
    off: str = ""
    # Whether it is the --no- form.
    negated: bool = False

    @property
    def kind(self) -> Any:
        """The type of the value that a user gives."""
        return bool if self.on else field_types()[self.field]


SWITCHES = {
    "use-rollout-logprobs": Spelling("algorithm.old_logprobs", on="rollout", off="auto"),
    "disable-grpo-std-normalization": Spelling(
        "algorithm.normalize_by_std", on="false", off="true"
    ),
    "calculate-per-token-loss": Spelling("algorithm.denominator", on="tokens", off="sequences"),
}


def _as_flag(field: str) -> str:
    return field.replace("_", "-")


# Short names, without dashes in front -> fields.
ALIASES = _OTHER_NAMES | {
    _as_flag(name): f"{section}.{name}"
    for section, names in _SHORT_NAMES.items()
    for name in names.split()
}


@cache
def field_types(
    section: Any = RunConfig, prefix: str = "", *, marked: bool = False
) -> dict[str, Any]:
    """The fields of RunConfig (or of a section) by dotted name, with their types.

    marked: with what `Annotated` notes at them.

    Where a section is a union of classes, it has the fields of all of them. A list of
    sections is one field.
    """
    hints = get_type_hints(section)
    shown = get_type_hints(section, include_extras=True) if marked else hints
    found: dict[str, Any] = {}
    for f in fields(section):
        name = prefix + f.name
        kind = hints[f.name]
        classes: list[Any] = [c for c in (kind, *get_args(kind)) if is_dataclass(c)]
        if not classes or get_origin(kind) is list:
            found[name] = shown[f.name]
            continue
        for inner in classes:
            found.update(field_types(inner, f"{name}.", marked=marked))
    return found


@cache
def spellings() -> dict[str, Spelling]:
    """Every flag, without the dashes in front, and what it stands for."""
    named = {_as_flag(field): field for field in field_types()} | ALIASES
    plain = {name: Spelling(field) for name, field in named.items()} | SWITCHES
    negated = {}
    for name, spelling in plain.items():
        section, dot, leaf = name.rpartition(".")
        negated[f"{section}{dot}no-{leaf}"] = replace(spelling, negated=True)
    return {**negated, **plain}


def parse(args: Sequence[str]) -> list[Flag]:
    """Take flags apart. Raises RunError for an unknown flag, a missing value, a stray word, and for
    bytes that are no UTF-8, which neither a batch script nor a configuration could hold.
    """
    for word in args:
        if not word.isascii() and word != word.encode(errors="replace").decode():
            raise RunError(f"{ascii(word)} on the command line is not UTF-8; write it in UTF-8")
    rest = list(args)
    found = []
    while rest:
        found.append(_take_flag(rest))
    return found


def refuse_repeated(flags: Sequence[Flag]) -> None:
    """Raises RunError for a field that two flags of a command line set."""
    first: dict[str, Flag] = {}
    for flag in flags:
        if flag.field in first:
            raise RunError(
                f"{flag.name} sets {flag.field}, which {first[flag.field].name} has set; "
                "give one of them"
            )
        first[flag.field] = flag


def _take_flag(rest: list[str]) -> Flag:
    """Take the first flag, and its value where that is the next word, out of `rest`."""
    word = rest.pop(0)
    name, equals, text = word.partition("=")
    if not word.startswith("--"):
        raise RunError(
            f"{word!r} belongs to no flag{elsewhere(name)}; "
            "write --name VALUE, --name=VALUE, --switch or --no-switch"
        )
    plain = _as_flag(name.removeprefix("--"))
    if plain not in spellings():
        hint = elsewhere(name) or suggest(plain, _suggestions())
        raise RunError(f"unknown flag {name}{hint}; --help lists all flags")
    spelling = spellings()[plain]
    is_switch = bool in (spelling.kind, *get_args(spelling.kind))
    if spelling.negated and not is_switch:
        raise RunError(
            f"{name}: {spelling.field} is not a switch; "
            f"give it a value: --{_as_flag(spelling.field)} VALUE"
        )
    container = get_origin(spelling.kind)
    if container is list:
        items = [text] if equals else _take_values(name, rest)
        if is_dataclass(get_args(spelling.kind)[0]):
            items = [one for item in items for one in _sets_in(item)]
        return Flag(name, spelling.field, items)
    if spelling.negated:
        if equals:
            raise RunError(f"{word}: a --no- flag takes no value")
        text = "false"
    elif not equals and is_switch and (spelling.kind is bool or not _value_follows(rest)):
        text = "true"
    elif not equals:
        text = _take_value(name, rest)
    if container is dict:
        return Flag(name, spelling.field, _json_object(name, text))
    if spelling.on:
        values = {"true": spelling.on, "false": spelling.off}
        if text.lower() not in values:
            raise RunError(f"{word}: write --{plain} or --no-{plain}, or true or false behind it")
        text = values[text.lower()]
    is_optional = type(None) in get_args(spelling.kind)
    if is_optional and text.lower() == "none":
        return Flag(name, spelling.field, None)
    return Flag(name, spelling.field, text)


def elsewhere(name: str, *, as_fields: bool = False) -> str:
    """What a flag of another tool is called here, as a hint; empty for one of no tool.

    as_fields: as in a YAML file, by the fields' dotted names.
    """
    folder = Path(__file__).with_name("upstream")
    plain = _as_flag(name.lstrip("-").rpartition(".")[2])
    for here, names in yaml.safe_load((folder / "other_tools.yaml").read_text("utf-8")).items():
        if plain in names.split():
            return f"; did you mean {_FLAG.sub(_field_of, here) if as_fields else here}?"
    option = plain.removeprefix("sglang-").replace("-", "_")
    options = json.loads((folder / "sglang.json").read_text("utf-8"))["names"]
    if plain.startswith("sglang-") and option in options:
        return f"; did you mean --rollout.sglang '{{\"{option}\": VALUE}}'?"
    return ""


def _field_of(flag: re.Match[str]) -> str:
    """The field that a flag sets; the flag itself where it is none of the fields'."""
    spelling = spellings().get(flag[1])
    return spelling.field if spelling else flag[0]


def _json_object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise RunError(f"{name} needs a JSON object ('{{\"key\": 1}}'), not {text!r}")
    return value


def _take_values(name: str, rest: list[str]) -> list[str]:
    """The words up to the next flag, one at least."""
    values = [_take_value(name, rest)]
    while rest and not rest[0].startswith("--"):
        values.append(rest.pop(0))
    return values


def _sets_in(text: str) -> list[str]:
    """Of a list of sections: one as JSON, or the names of several with commas between them."""
    is_json = text.lstrip().startswith("{")
    return [text] if is_json else [name.strip() for name in text.split(",") if name.strip()]


def _take_value(name: str, rest: list[str]) -> str:
    if not _value_follows(rest):
        raise RunError(f"{name} needs a value")
    return rest.pop(0)


def _value_follows(rest: Sequence[str]) -> bool:
    return bool(rest) and not rest[0].startswith("--")


def _suggestions() -> dict[str, str]:
    """What a user might have meant (flags, or the last words of dotted ones) -> the
    flag to suggest."""
    names = [name for name, spelling in spellings().items() if not spelling.negated]
    by_last_word = {name.rpartition(".")[2]: f"--{name}" for name in names}
    by_name = {name: f"--{name}" for name in names}
    return {**by_last_word, **by_name}


def suggest(word: str, choices: Mapping[str, str]) -> str:
    """`; did you mean X or Y?`, or nothing where no choice is close.

    `choices` maps what a user may have meant to what is suggested for it.
    """
    near = get_close_matches(word, choices, n=2, cutoff=0.7)
    if not near:
        near = [choice for choice in choices if choice.startswith(word)][:2]
    if not near:
        near = get_close_matches(word, choices, n=2, cutoff=0.6)
    if not near:
        return ""
    suggested = dict.fromkeys(choices[choice] for choice in near)
    return f"; did you mean {' or '.join(suggested)}?"
