"""The files that tell how far trainer and engine were apart on each token of recorded samples.

    rollouts/gaps_<k>-<rank>.npz    of rollout k, by data-parallel rank

A file of gaps finds its samples by their tokens: equal sequences have equal logprobs.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from nanoslime.storage.array_file import write_tree


def gaps_file(directory: Path, step: int, dp_rank: int) -> Path:
    return directory / f"gaps_{step}-{dp_rank}.npz"


def write_gaps(path: Path, sequences: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """Writes the gaps [T] of sequences of tokens [T], as float16."""
    tree = {tokens_key(token_ids): gaps.astype(np.float16) for token_ids, gaps in sequences}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tree(path, tree)


def tokens_key(token_ids: np.ndarray) -> str:
    """A hash of a sequence of tokens, whatever its integer type."""
    return xxhash.xxh3_128_hexdigest(token_ids.astype(np.int32).tobytes())
