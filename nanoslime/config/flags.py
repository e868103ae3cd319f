"""Command-line flags: short names that the field knows, and `--section.field` for everything else.

    --tp-size 2   --tp-size=2   --training.tp-size 2   --use-kl-loss   --no-use-kl-loss   --use-kl-loss=false

A flag is only taken apart here. Its value stays text, is laid over the YAML files and validated with them, so
that a wrong value reads the same wherever it came from. tyro prints the help.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

import tyro

from nanoslime.config.run import RunConfig
from nanoslime.types import RunError

ALIASES = {
    "hf-checkpoint": "model.hf_checkpoint",
    "dtype": "model.dtype",
    "backend": "training.backend",
    "num-gpus": "training.num_gpus",
    "tp-size": "training.tp_size",
    "pp-size": "training.pp_size",
    "cp-size": "training.cp_size",
    "ep-size": "training.ep_size",
    "lr": "training.lr",
    "num-steps-per-rollout": "training.num_steps_per_rollout",
    "max-tokens-per-microbatch": "training.max_tokens_per_microbatch",
    "num-rollout": "rollout.num_rollout",
    "rollout-batch-size": "rollout.rollout_batch_size",
    "n-samples-per-prompt": "rollout.n_samples_per_prompt",
    "max-new-tokens": "rollout.max_new_tokens",
    "temperature": "rollout.temperature",
    "top-p": "rollout.top_p",
    "top-k": "rollout.top_k",
    "engine": "rollout.engine",
    "engine-tp-size": "rollout.engine_tp_size",
    "eps-clip": "algorithm.eps_clip",
    "eps-clip-high": "algorithm.eps_clip_high",
    "kl-coef": "algorithm.kl_coef",
    "use-kl-loss": "algorithm.use_kl_loss",
    "kl-loss-coef": "algorithm.kl_loss_coef",
    "kl-loss-type": "algorithm.kl_loss_type",
    "use-unbiased-kl": "algorithm.use_unbiased_kl",
    "use-rollout-logprobs": "algorithm.use_rollout_logprobs",
    "prompts": "data.prompts",
    "eval-prompts": "data.eval_prompts",
    "reward": "data.reward",
    "chat-template": "data.chat_template",
    "eval-interval": "eval.interval",
    "save-interval": "checkpoint.interval",
    "use-tensorboard": "tracking.use_tensorboard",
    "use-wandb": "tracking.use_wandb",
    "nodes": "cluster.nodes",
    "rollout-nodes": "cluster.rollout_nodes",
    "engine-gpus": "cluster.engine_gpus",
    "time-limit-min": "cluster.time_limit_min",
    "run-root": "cluster.run_root",
    "partition": "cluster.partition",
    "account": "cluster.account",
    "submit": "cluster.submit",
}


@dataclass(frozen=True)
class Flag:
    """One flag as typed: the field it sets and the text of its value (None: the field's "off")."""

    name: str
    field: str
    value: str | None


@cache
def field_types() -> dict[str, Any]:
    """Every field of RunConfig by its dotted name, with its type."""
    return dict(_walk(RunConfig, ""))


def _walk(section: Any, prefix: str) -> list[tuple[str, Any]]:
    found, hints = [], get_type_hints(section)
    for f in fields(section):
        kind = hints[f.name]
        found += _walk(kind, f"{prefix}{f.name}.") if is_dataclass(kind) else [(prefix + f.name, kind)]
    return found


def parse(args: Sequence[str]) -> list[Flag]:
    """Take flags apart. Raises RunError for an unknown flag, a missing value, a stray word."""
    flags, rest = [], list(args)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise RunError(
                f"{word!r} belongs to no flag; write --name VALUE, --name=VALUE, --switch or --no-switch"
            )
        name, equals, value = word.partition("=")
        field, off = _field_of(name)
        kind = field_types()[field]
        if get_origin(kind) in (dict, list):
            raise RunError(f"{name} sets {field}, a {get_origin(kind).__name__}, which is set in YAML only")
        if off:
            if equals:
                raise RunError(f"{word}: a --no- flag takes no value")
            value = "false"
        elif not equals and kind is bool:
            value = "true"
        elif not equals:
            if not rest or rest[0].startswith("--"):
                raise RunError(f"{name} needs a value")
            value = rest.pop(0)
        flags.append(Flag(name, field, None if _optional(kind) and value.lower() == "none" else value))
    return flags


def _optional(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType) and type(None) in get_args(kind)


def _field_of(name: str) -> tuple[str, bool]:
    """The field that a flag sets, and whether the flag is the --no- form of a switch."""
    plain = name[2:].replace("_", "-")
    field = _known(plain)
    if field:
        return field, False
    section, _, leaf = plain.rpartition(".")
    if leaf.startswith("no-"):
        field = _known(f"{section}.{leaf[3:]}" if section else leaf[3:])
        if field and field_types()[field] is bool:
            return field, True
        if field:
            raise RunError(
                f"{name}: {field} is not a switch; give it a value: --{field.replace('_', '-')} VALUE"
            )
    raise RunError(f"unknown flag {name}{suggest(plain, spellings())}; --help lists all flags")


def _known(plain: str) -> str | None:
    field = ALIASES.get(plain, plain.replace("-", "_"))
    return field if field in field_types() else None


@cache
def spellings() -> dict[str, str]:
    """What a user might have meant (aliases, dotted names, last parts of those) -> the flag to suggest."""
    dotted = [name.replace("_", "-") for name in field_types()]
    table = {name.rpartition(".")[2]: "--" + name for name in dotted} | {name: "--" + name for name in dotted}
    return table | {alias: "--" + alias for alias in ALIASES}


def suggest(word: str, choices: Mapping[str, str]) -> str:
    """`; did you mean X or Y?`, or nothing where no choice is close."""
    near = get_close_matches(word, choices, n=2, cutoff=0.7) or [c for c in choices if c.startswith(word)][:2]
    close = [choices[c] for c in near or get_close_matches(word, choices, n=2, cutoff=0.6)]
    return f"; did you mean {' or '.join(dict.fromkeys(close))}?" if close else ""


def print_help(default: RunConfig, prog: str) -> None:
    """Every flag with its value after the YAML files, as tyro shows them, and the short names before."""
    width = max(map(len, ALIASES))
    short = "\n".join(f"  --{alias:{width}}  --{field.replace('_', '-')}" for alias, field in ALIASES.items())
    intro = f"Values shown are those of the recipe and cluster file given. Short names:\n\n{short}"
    try:
        tyro.cli(RunConfig, default=default, args=["--help"], prog=prog, description=intro)
    except SystemExit:  # tyro ends the process after its help; what else to print is the caller's to decide
        return
