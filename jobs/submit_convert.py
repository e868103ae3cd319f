"""Submits a checkpoint conversion as a job: the command of tools/conversion/job.py.

python jobs/submit_convert.py hf-to-megatron HF_DIR OUT [options of tools/hf_to_megatron.py]
"""

import os
import sys

from jobs.checkout import environment

if __name__ == "__main__":
    command = [sys.executable, "-m", "tools.conversion.job", *sys.argv[1:]]
    os.execve(sys.executable, command, environment())
