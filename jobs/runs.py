"""Watches runs, looks into them and ends them: the commands of tools/watch/commands.py.

python3 jobs/runs.py COMMAND [RUN] [options]; COMMAND is one of
    ps status top logs attach tunnel stop report samples sync compare
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from jobs.checkout import start

if __name__ == "__main__":
    start("tools.watch.commands")
