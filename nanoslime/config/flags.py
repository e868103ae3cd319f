"""Command-line flags: short names that the field knows, and `--section.field` for everything else.

    --tp-size 2   --tp-size=2   --training.tp-size 2   --use-kl-loss   --no-use-kl-loss   --use-kl-loss=false

The fields of `algorithm` are those of all algorithms; whether the chosen one has a field is validated later.

A flag is only taken apart here. Its value stays text, is laid over the YAML files and validated with them, so
that a wrong value reads the same wherever it came from. tyro prints the help.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

import tyro

from nanoslime.config.run import RunConfig
from nanoslime.types import RunError

_SHORT = {
    "model": "hf-checkpoint dtype",
    "training": "backend num-gpus tp-size pp-size vpp-size cp-size ep-size etp-size sequence-parallel "
    "allow-slow lr num-steps-per-rollout max-tokens-per-microbatch",
    "rollout": "num-rollout rollout-batch-size n-samples-per-prompt max-new-tokens temperature top-p top-k "
    "engine engine-tp-size load-rollouts rollout-only",
    "algorithm": "eps-clip eps-clip-high eps-clip-c kl-coef use-kl-loss kl-loss-coef kl-loss-type "
    "use-unbiased-kl entropy-coef old-logprobs denominator normalize-advantages gamma",
    "algorithm.correction": "use-tis tis-clip tis-clip-low tis-level use-opsm opsm-delta",
    "data": "prompts eval-prompts reward chat-template",
    "tracking": "use-tensorboard use-wandb",
    "cluster": "nodes rollout-nodes engine-gpus colocate time-limit-min run-root partition account submit",
}
ALIASES = {
    "eval-interval": "eval.interval",
    "save-interval": "checkpoint.interval",
    "algorithm": "algorithm.name",
    "advantage-estimator": "algorithm.name",
}
ALIASES |= {
    n: f"{section}.{n.replace('-', '_')}"
    for section, names in _SHORT.items()
    for n in names.split()
}
SWITCHES = {  # known elsewhere as switches: field, value when on, value when off
    "use-rollout-logprobs": ("algorithm.old_logprobs", "rollout", "recomputed"),
    "disable-grpo-std-normalization": ("algorithm.normalize_by_std", "false", "true"),
    "calculate-per-token-loss": ("algorithm.denominator", "tokens", "sequences"),
}


@dataclass(frozen=True)
class Flag:
    """One flag as typed: the field it sets and the text of its value (None: the field's "off")."""

    name: str
    field: str
    value: str | None


@cache
def field_types(section: Any = RunConfig, prefix: str = "") -> dict[str, Any]:
    """Every field of RunConfig (or a section) by its dotted name, with its type; of a union, those of all."""
    found, hints = dict[str, Any](), get_type_hints(section)
    for f in fields(section):
        name, kind = prefix + f.name, hints[f.name]
        classes: list[Any] = [c for c in (kind, *get_args(kind)) if is_dataclass(c)]
        for types in [field_types(c, f"{name}.") for c in classes] or [{name: kind}]:
            found |= types
    return found


def parse(args: Sequence[str]) -> list[Flag]:
    """Take flags apart. Raises RunError for an unknown flag, a missing value, a stray word."""
    flags, rest = [], list(args)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            forms = "--name VALUE, --name=VALUE, --switch or --no-switch"
            raise RunError(f"{word!r} belongs to no flag; write {forms}")
        name, equals, value = word.partition("=")
        plain = name[2:].replace("_", "-")
        if plain not in spellings():
            raise RunError(
                f"unknown flag {name}{suggest(plain, _suggestions())}; --help lists all flags"
            )
        field, off = spellings()[plain]
        switch = SWITCHES.get(plain.removeprefix("no-"))
        kind: Any = bool if switch else field_types()[field]
        if off and kind is not bool:
            flag = f"--{field.replace('_', '-')}"
            raise RunError(f"{name}: {field} is not a switch; give it a value: {flag} VALUE")
        if get_origin(kind) in (dict, list):
            raise RunError(
                f"{name} sets {field}, a {get_origin(kind).__name__}, which is set in YAML only"
            )
        if off and equals:
            raise RunError(f"{word}: a --no- flag takes no value")
        if off or (kind is bool and not equals):
            value = "false" if off else "true"
        elif not equals:
            if not rest or rest[0].startswith("--"):
                raise RunError(f"{name} needs a value")
            value = rest.pop(0)
        if switch:
            if value not in ("true", "false"):
                raise RunError(f"{word}: write {name} or --no-{plain}, or true or false behind it")
            value = switch[1] if value == "true" else switch[2]
        off = type(None) in get_args(kind) and value.lower() == "none"
        flags.append(Flag(name, field, None if off else value))
    return flags


@cache
def spellings() -> dict[str, tuple[str, bool]]:
    """Every flag without its dashes -> the field it sets, and whether it is the --no- form."""
    names = {field.replace("_", "-"): field for field in field_types()} | ALIASES
    names |= {name: field for name, (field, _, _) in SWITCHES.items()}
    parted = [(*name.rpartition("."), field) for name, field in names.items()]
    off = {f"{section}{dot}no-{leaf}": (field, True) for section, dot, leaf, field in parted}
    return off | {name: (field, False) for name, field in names.items()}


def _suggestions() -> dict[str, str]:
    """What a user might have meant (flags, or the last parts of dotted ones) -> the flag to suggest."""
    names = [name for name, (_, off) in spellings().items() if not off]
    return {name.rpartition(".")[2]: f"--{name}" for name in names} | {
        name: f"--{name}" for name in names
    }


def suggest(word: str, choices: Mapping[str, str]) -> str:
    """`; did you mean X or Y?`, or nothing where no choice is close."""
    near = (
        get_close_matches(word, choices, n=2, cutoff=0.7)
        or [c for c in choices if c.startswith(word)][:2]
    )
    close = [choices[c] for c in near or get_close_matches(word, choices, n=2, cutoff=0.6)]
    return f"; did you mean {' or '.join(dict.fromkeys(close))}?" if close else ""


def print_help(default: RunConfig, prog: str) -> None:
    """Every flag with its value after the YAML files, and before them the short names; ends the process."""
    meaning = ALIASES | {name: f"{field} {on}" for name, (field, on, _) in SWITCHES.items()}
    width = max(map(len, meaning))
    short = "\n".join(
        f"  --{name:{width}}  --{field.replace('_', '-')}" for name, field in meaning.items()
    )
    shown = (
        "Values shown, and the algorithm, are those of the recipe, cluster file and flags given."
    )
    intro, chosen = f"{shown} Short names:\n\n{short}", tyro.conf.AvoidSubcommands[RunConfig]
    tyro.cli(chosen, default=default, args=["--help"], prog=prog, description=intro)
