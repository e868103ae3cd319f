"""Describes the cluster that this machine belongs to, once: the command of tools/site/command.py.

python3 jobs/init_site.py [--yes] [options]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from jobs.checkout import start

if __name__ == "__main__":
    start("tools.site.command")
