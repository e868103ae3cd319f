"""Evaluates a checkpoint on the evaluation sets of a recipe: the command of tools/evaluate.py.

python -m nanoslime.evaluate CHECKPOINT [RECIPE.yaml] [--output FILE] [flags]
"""

import os
import sys

if __name__ == "__main__":
    os.execv(sys.executable, [sys.executable, "-m", "tools.evaluate", *sys.argv[1:]])
