"""Looks into the directories of runs.

    python jobs/runs.py samples RUN [--step K] [--worst N | --best N] [--group ID] [--status error]

`samples` prints the recorded samples of a rollout, each token coloured by how far the trainer's
logprob of it is from the engine's.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from jobs import samples
from nanoslime.run_dir import RunDir
from nanoslime.types import RunError


def _samples(parser: argparse.ArgumentParser) -> Callable[[RunDir, argparse.Namespace], str]:
    parser.add_argument("--step", type=int, help="the rollout, from 0 on; default: the last")
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--worst", type=int, metavar="N", help="the N of lowest reward (default: 5)")
    order.add_argument("--best", type=int, metavar="N", help="the N of highest reward")
    parser.add_argument("--group", type=int, metavar="ID", help="those of one group alone")
    parser.add_argument(
        "--status",
        choices=("completed", "truncated", "aborted", "error"),
        help="those of one status alone",
    )
    parser.add_argument(
        "--color",
        action=argparse.BooleanOptionalAction,
        default=sys.stdout.isatty(),
        help="default: colours on a terminal",
    )
    return _show_samples


def _show_samples(run: RunDir, asked: argparse.Namespace) -> str:
    choice = samples.Choice(asked.worst, asked.best, asked.group, asked.status)
    return samples.show(run, asked.step, choice, color=asked.color)


COMMANDS = {"samples": _samples}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python jobs/runs.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    show = {}
    for name, add_options in COMMANDS.items():
        command = commands.add_parser(name)
        command.add_argument("run", type=Path, metavar="RUN", help="the run's directory")
        show[name] = add_options(command)
    asked = parser.parse_args(argv)
    try:
        print(show[asked.command](RunDir.open(asked.run), asked))
    except (RunError, OSError) as e:
        print(e, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
