"""A Hugging Face checkpoint from assembled tensors: the disk transport of weight sync, and a run's export."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from nanoslime.storage.commit import commit, partial_dir
from nanoslime.storage.safetensors_file import Spec, copy_other_files, write_files


def write_checkpoint(
    tensors: Iterable[tuple[str, Tensor]], specs: list[Spec], destination: Path, *, like: Path
) -> None:
    """Writes `tensors`, declared by `specs` in order, and the other files of `like`; tensor by tensor. The
    directory appears whole or not at all, in place of an earlier one."""
    partial = partial_dir(destination)
    copy_other_files(like, partial)
    buffers = (
        (name, t.cpu().contiguous().view(torch.uint8).numpy().reshape(-1)) for name, t in tensors
    )
    write_files(partial, specs, buffers, max_shard_bytes=4 << 30)
    commit(partial, destination)
