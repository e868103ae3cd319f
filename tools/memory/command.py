"""Whether a run on this machine has the memory that it needs.

    python -m tools.memory.command CONFIG

CONFIG is the run's configuration, with a model on this machine. nanoslime.train starts it, since
nothing else in a run needs the arithmetic. Its exit code is 0 where the memory lasts; else the last
line that it prints says what does not fit.
"""

import sys
from pathlib import Path

from nanoslime.config.load import read
from nanoslime.models.local_checkpoint import with_local_checkpoint
from nanoslime.types import RunError
from tools.memory.plan import plan


def main(argv: list[str]) -> int:
    [file] = argv
    try:
        plan(*with_local_checkpoint(read(Path(file)), download=False))
    except RunError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
