"""Submits a GRPO run, or rehearses it: the command of tools/submit/grpo.py.

python jobs/submit_grpo.py [--recipe FILE|NAME] [--cluster FILE|NAME] [options]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from jobs.checkout import start

if __name__ == "__main__":
    start("tools.submit.grpo")
