"""A Hugging Face checkpoint from assembled tensors: the disk transport of weight sync, and the export at the
end of a run.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from nanoslime.storage.commit import commit, partial_dir
from nanoslime.storage.safetensors_file import HFCheckpointWriter

WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth")


def write_checkpoint(
    tensors: Iterable[tuple[str, Tensor]],
    specs: list[tuple[str, str, tuple[int, ...]]],
    destination: Path,
    *,
    like: Path,
    max_shard_bytes: int = 4 << 30,
) -> Path:
    """Writes `tensors`, declared by `specs` (name, safetensors dtype, shape) in order, and the other files
    of `like`.

    Streams tensor by tensor; the directory appears whole or not at all, in place of an earlier one.
    """
    partial = partial_dir(destination)
    for source in like.iterdir():
        if source.is_file() and not source.name.endswith(WEIGHT_SUFFIXES) and source.name != "manifest.json":
            shutil.copy2(source, partial / source.name)
    writer = HFCheckpointWriter(partial, specs, max_shard_bytes)
    for name, tensor in tensors:
        writer.write(name, memoryview(tensor.cpu().contiguous().view(torch.uint8).numpy().reshape(-1)))
    writer.close()
    commit(partial, destination)
    return destination
