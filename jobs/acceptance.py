"""The first hour on a cluster: a ladder of short runs, and a report (tools/acceptance/command.py).

python3 jobs/acceptance.py [--max-nodes N] [--report DIR] [flags of jobs/submit_grpo.py]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from jobs.checkout import start

if __name__ == "__main__":
    start("tools.acceptance.command")
