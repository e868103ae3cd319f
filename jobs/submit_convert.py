"""Submits a checkpoint conversion as a job: the command of tools/conversion/job.py.

python3 jobs/submit_convert.py hf-to-megatron HF_DIR OUT [options of tools/hf_to_megatron.py]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from jobs.checkout import start

if __name__ == "__main__":
    start("tools.conversion.job")
