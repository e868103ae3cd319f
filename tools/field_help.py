"""What `jobs/submit_grpo.py --help` prints: an overview, all fields, or those a word is about.

    --help        the flags that matter, two examples, and the command's own options
    --help all    every field, with its value after the YAML files and flags that are given
    --help tp     the fields whose name has the word, else those whose sentences have it

What holds a mapping or sections belongs into a YAML file, and is shown without dashes.
"""

import argparse
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from functools import partial
from typing import Any, Literal, get_args, get_origin

from jobs.checkout import typed
from nanoslime.config import RunConfig
from nanoslime.config.flags import ALIASES, HELP, SWITCHES, field_types, suggest
from nanoslime.config.load import load
from nanoslime.run_dir import RunDir
from nanoslime.types import RunError
from tools.fields import FieldValue, values
from tools.submit import grpo as submit_grpo

ALL = "all"
_WIDTH = 100
_OVERVIEW = """\
Plans a GRPO run, checks it and submits it to SLURM, or rehearses it where there is no SLURM.

  --nodes N              nodes of the job: trainers take the first ones, engines the last
  --recipe FILE|NAME     the experiment: a YAML file, or one of those listed below
  --hf-checkpoint MODEL  the model: a directory, or OWNER/NAME of the hub
  --prompts FILE         the training prompts: .jsonl, .parquet, or OWNER/NAME of the hub

A rehearsal on this machine, with a tiny model; the plan of a job, without submitting it:
  {program} --nodes 4
  {program} --nodes 4 --recipe gsm8k --cluster h200 \\
      --hf-checkpoint Qwen/Qwen3-4B --prompts train.jsonl --dry-run

{options}

Each field is a flag: --help all shows them all, --help tp those about tp.
"""
_INTRO = """\
--name VALUE, --name=VALUE, or --name and --no-name of a switch; `none` empties what may be empty.
The values are those after the recipe, the cluster file and the flags that are given.
What has no dashes stands in a recipe or, without `cluster.` in front, in a cluster file."""
_KINDS = {int: "INT", float: "FLOAT", str: "TEXT"}


def main(argv: list[str]) -> int:
    """The exit code: 2 where a flag is wrong, or no field is about the word."""
    topic, words = asked(argv)
    try:
        print(text_about(topic, _config(words)) if topic else overview(), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (RunError, OSError) as error:
        print(f"submit_grpo: {error}", file=sys.stderr)
        return 2
    return 0


def asked(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The word behind --help, or an empty text, and the command line without both."""
    words = list(argv)
    for at, word in enumerate(words):
        name, _, topic = word.partition("=")
        if name not in HELP:
            continue
        behind = words[at + 1 : at + 2]
        if topic or not behind or behind[0].startswith("-"):
            return topic, words[:at] + words[at + 1 :]
        return behind[0], words[:at] + words[at + 2 :]
    return "", words


def _config(words: list[str]) -> RunConfig:
    """The configuration whose values are shown; without a recipe, of none."""
    command, flags = submit_grpo.parse(words)
    recipe = RunDir.open(command.resume).config_to_resume() if command.resume else command.recipe
    return load(recipe, command.cluster, flags)


def overview() -> str:
    """The help of 25 lines."""
    parser = submit_grpo.make_parser()
    parser.formatter_class = partial(argparse.HelpFormatter, width=_WIDTH, max_help_position=25)
    _, _, options = parser.format_help().partition("options:\n")
    return _OVERVIEW.format(program=typed("jobs/submit_grpo.py"), options=options.rstrip())


def text_about(topic: str, config: RunConfig) -> str:
    """The fields that `topic` is about. Raises RunError where there is none."""
    found = list(values(config))
    if topic != ALL:
        found = _about(_plain(topic), found)
    if not found:
        names = [name.rpartition(".")[2] for name in field_types()] + list(ALIASES)
        hint = suggest(topic, {name: name for name in names})
        raise RunError(f"no field is about {topic!r}{hint}; `--help all` shows all of them")
    return "\n".join([_INTRO, *_entries(found)])


def _plain(text: str) -> str:
    return text.lower().replace("-", "_")


def _about(word: str, found: list[FieldValue]) -> list[FieldValue]:
    named = [one for one in found if any(word in name for name in _names(one.name))]
    return named or [one for one in found if word in _plain(one.sentences)]


def _names(field: str) -> list[str]:
    """The names that a field has, as fields are written; its own is the last."""
    short = [alias.replace("-", "_") for alias, aimed in ALIASES.items() if aimed == field]
    return [*short, field]


def _entries(found: list[FieldValue]) -> Iterator[str]:
    """Each field's flags, values and sentences, below the names of their sections."""
    section = None
    for one in found:
        of_one = one.name.rpartition(".")[0]
        if of_one != section:
            yield f"\n{of_one or 'run'}"
            section = of_one
        yield f"  {_head(one)}"
        switches = [name for name, spelling in SWITCHES.items() if spelling.field == one.name]
        hints = [f"--{name} sets {SWITCHES[name].on}." for name in switches]
        sentences = " ".join([one.sentences, *hints])
        indent = " " * 6
        yield textwrap.fill(sentences, _WIDTH, initial_indent=indent, subsequent_indent=indent)


def _head(one: FieldValue) -> str:
    """A field's flags, what they take, and its value."""
    kind = field_types()[one.name]
    value = _text(one.value)
    if one.value != one.default:
        value += f" (default: {_text(one.default)})"
    if in_file_only(kind):
        return f"{one.name}: {value}"
    flags = ", ".join("--" + name.replace("_", "-") for name in _names(one.name))
    takes = _takes(kind)
    return f"{flags} {takes} = {value}" if takes else f"{flags} = {value}"


def in_file_only(kind: Any) -> bool:
    """Whether a field of this type has its place in a YAML file rather than in a command line."""
    if get_origin(kind) is list:
        return is_dataclass(get_args(kind)[0])
    return get_origin(kind) is dict


def _takes(kind: Any) -> str:
    """What a flag of this type takes; nothing where it is a switch."""
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    inner = [_takes(one) for one in get_args(kind) if one is not type(None)]
    if get_origin(kind) is list:
        return f"{inner[0]} ..."
    return " or ".join(inner) or _KINDS.get(kind, "")


def _text(value: Any) -> str:
    """A value as it is typed."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if value in ("", [], {}):
        return "(empty)"
    if isinstance(value, list):
        return " ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
