"""Memory as sbatch and sacctmgr write it."""

import re

_MEGABYTES = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}


def megabytes(memory: str) -> float:
    """What sbatch --mem takes, in MB; 0 for what it refuses itself, and for all of a node."""
    match = re.fullmatch(r"(\d+)([KMGT]?)B?", memory.upper())
    return int(match[1]) * _MEGABYTES[match[2] or "M"] if match else 0
