"""The first hour on a cluster: a ladder of short runs, and a report (tools/acceptance/command.py).

python jobs/acceptance.py [--max-nodes N] [--report DIR] [flags of jobs/submit_grpo.py]
"""

import os
import sys

from jobs.checkout import environment

if __name__ == "__main__":
    command = [sys.executable, "-m", "tools.acceptance.command", *sys.argv[1:]]
    os.execve(sys.executable, command, environment())
