"""Where a stand-in for the trainer is started: the attempt that its command line names."""

import argparse
from pathlib import Path

from nanoslime.run_dir import Attempt, RunDir


def parse_place(
    parser: argparse.ArgumentParser | None = None,
) -> tuple[Attempt, argparse.Namespace]:
    """The attempt of --run and --attempt, and all arguments."""
    parser = parser or argparse.ArgumentParser()
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--attempt", type=int, required=True)
    arguments = parser.parse_args()
    return RunDir.open(arguments.run).attempt(arguments.attempt), arguments
