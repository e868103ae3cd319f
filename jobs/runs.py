"""Watches runs, looks into them and ends them: the commands of tools/watch/commands.py.

python3 jobs/runs.py ps|status|top|logs|attach|tunnel|stop|report|samples|sync [RUN] [options]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from jobs.checkout import start

if __name__ == "__main__":
    start("tools.watch.commands")
