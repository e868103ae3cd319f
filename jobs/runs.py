"""Looks into the directories of runs.

    python jobs/runs.py samples RUN [--step K] [--worst N | --best N] [--group ID] [--status error]

`samples` prints recorded samples of a rollout, each token coloured by how far the trainer's
logprob of it is from the engine's.
"""

import argparse
import signal
import sys

from jobs import samples
from nanoslime.types import RunError


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python jobs/runs.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(required=True)
    samples.add_options(commands.add_parser("samples"))
    asked = parser.parse_args(argv)
    try:
        print(asked.show(asked))
    except (RunError, OSError) as e:
        print(e, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    # Whoever reads may stop to, as head and less do.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main(sys.argv[1:]))
