"""Writes Hugging Face checkpoints, for weight sync by files and for exports."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanoslime.storage.commit import commit, partial_dir
from nanoslime.storage.safetensors_file import copy_other_files, write_files
from nanoslime.weight_sync.assemble import Assembler
from nanoslime.weight_sync.transport import EngineSide, RankSide, version_dir

MAX_SHARD_BYTES = 4 << 30


class CheckpointSender:
    """A `Sender`. Rank 0 writes the files, and the driver has the engines load them."""

    def __init__(self, rank: RankSide, engines: EngineSide):
        self._rank = rank
        self._directory = engines.directory

    def send(self, version: int) -> int:
        path = version_dir(self._directory, version)
        write_checkpoint(self._rank.assembler, self._rank.rank, path, like=self._rank.model_dir)
        if self._rank.rank > 0:
            return 0
        return sum(file.stat().st_size for file in path.glob("*.safetensors"))

    def close(self) -> None: ...


def write_checkpoint(assembler: Assembler, rank: int, destination: Path, *, like: Path) -> None:
    """Writes the current weights and the other files of `like`; collective.

    The directory appears whole or not at all, in place of an earlier one.
    """
    tensors = assembler.tensors()
    if rank > 0:
        for _ in tensors:  # sends this rank's shards
            raise RuntimeError("only rank 0 assembles tensors")
        return
    partial = partial_dir(destination)
    copy_other_files(like, partial)
    write_files(partial, assembler.specs, _as_bytes(tensors), max_shard_bytes=MAX_SHARD_BYTES)
    commit(partial, destination)


def _as_bytes(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, np.ndarray]]:
    for name, tensor in tensors:
        on_host = tensor.cpu().contiguous()
        yield name, on_host.view(torch.uint8).numpy().reshape(-1)
