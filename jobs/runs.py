"""Watches runs, looks into them and ends them: the commands of tools/watch/commands.py.

python jobs/runs.py ps|status|top|logs|attach|tunnel|stop|report|samples|sync [RUN] [options]
"""

import os
import sys

from jobs.checkout import environment

if __name__ == "__main__":
    command = [sys.executable, "-m", "tools.watch.commands", *sys.argv[1:]]
    os.execve(sys.executable, command, environment())
