"""Writes Hugging Face checkpoints by all trainer ranks, for weight sync by files and for exports.

    rank 0       makes the files, whose bytes are not there yet
    every rank   writes its own rows where they belong, bucket by bucket
    every rank   hashes its share of the files
    rank 0       writes the manifest, and gives the directory its name

Nothing is gathered: rows of a tensor are consecutive bytes of its file. Only ranks that share
rows, since tensor parallelism splits another dimension, exchange them for whole ones.
"""

import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanoslime.models.rules import Box
from nanoslime.storage import manifest
from nanoslime.storage.commit import commit, partial_dir, partial_path
from nanoslime.storage.safetensors_file import INDEX_FILE, copy_other_files, parse_head, plan_files
from nanoslime.storage.shared_files import publish_json
from nanoslime.types import RunError
from nanoslime.weight_sync.exchange import Exchange
from nanoslime.weight_sync.plan import PlannedTensor, TrainerWeights, lengths, rows_on_each
from nanoslime.weight_sync.transport import EngineSide, RankSide, Sent, version_dir

MAX_SHARD_BYTES = 4 << 30
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class CheckpointSender:
    """A `Sender`. All ranks write the files, and the driver has the engines load them."""

    def __init__(self, rank: RankSide, engines: EngineSide):
        self._num_bytes = 0
        self._writer = CheckpointWriter(rank.weights, rank.bucket_bytes)
        self._model_dir = rank.model_dir
        self._directory = engines.directory

    def prepare(self, version: int) -> None:
        """Writes all of it: engines read files when they are asked to."""
        path = version_dir(self._directory, version)
        self._num_bytes = self._writer.write(path, like=self._model_dir)

    def send(self, version: int, *, compares: bool = False) -> Sent:
        return Sent(self._num_bytes)

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Start:
    """Where the bytes of a tensor begin."""

    file: str
    offset: int


class CheckpointWriter:
    """One rank's part in writing checkpoints. Every method is collective."""

    def __init__(self, weights: TrainerWeights, bucket_bytes: int) -> None:
        self._weights = weights
        self._plan = weights.plan(rows_on_each, bucket_bytes, spreads=True)
        self._exchange = Exchange(self._plan, weights.rank, weights.device)
        by_name = {tensor.name: tensor for bucket in self._plan for tensor in bucket.tensors}
        # Some readers want each tensor aligned to its own elements.
        tensors = sorted(by_name.values(), key=lambda t: (-t.dtype.itemsize, t.name))
        specs = [
            (tensor.name, SAFETENSORS_DTYPES[tensor.dtype], tensor.shape) for tensor in tensors
        ]
        self._heads, self._index = plan_files(specs, MAX_SHARD_BYTES)
        self._starts: dict[str, _Start] = {}
        self._file_bytes: dict[str, int] = {}
        for file, head in self._heads.items():
            self._file_bytes[file] = len(head)
            for name, info in parse_head(Path(file), head).items():
                self._starts[name] = _Start(file, info.start)
                self._file_bytes[file] = info.stop

    def write(self, destination: Path, *, like: Path) -> int:
        """Writes the current weights and the other files of `like`; returns the bytes that this
        rank wrote.

        The directory appears whole or not at all, in place of an earlier one. Raises RunError
        on all ranks where one cannot write.
        """
        is_first = self._weights.rank == 0
        partial, *_ = self._all(lambda: self._prepare(destination, like) if is_first else None)
        num_bytes = self._write_rows(partial)
        own = sorted(self._heads)[self._weights.rank :: len(self._weights.owned)]
        hashed = self._all(lambda: manifest.hashes_of(partial, own))
        hashes = {name: digest for of_rank in hashed for name, digest in of_rank.items()}
        self._all(lambda: commit(partial, destination, hashes) if is_first else None)
        return num_bytes

    def _prepare(self, destination: Path, like: Path) -> Path:
        """Makes the directory with files of their full length, of which nothing is written.

        Its name is new: under one that has been used, a network filesystem may still show
        another node the directory of then, which has become a checkpoint.
        """
        leftovers = partial_path(destination.with_name(f"{destination.name}.*"))
        for leftover in leftovers.parent.glob(leftovers.name):
            shutil.rmtree(leftover, ignore_errors=True)
        partial = partial_dir(destination.with_name(f"{destination.name}.{secrets.token_hex(4)}"))
        copy_other_files(like, partial)
        for name, num_bytes in self._file_bytes.items():
            with open(partial / name, "wb") as file:
                file.truncate(num_bytes)
        if self._index is not None:
            publish_json(partial / INDEX_FILE, self._index)
        return partial

    def _write_rows(self, partial: Path) -> int:
        """A rank that cannot write still brings the others what they need."""
        shards = list(self._weights.shards())
        files = _Files(partial)
        if self._weights.rank == 0:
            # Not when the files are made: NFS takes a page that ends a file for known, and a
            # later write to it would put zeros over the rows of other nodes.
            for name, head in self._heads.items():
                files.write(_Start(name, 0), memoryview(head))
        num_bytes = 0
        for number, bucket in enumerate(self._plan):
            targets = bucket.targets_on(self._weights.rank)
            places = [_empty(tensor, box, self._weights.device) for tensor, box in targets]
            self._exchange.bring(number, shards, places)
            for (tensor, box), rows in zip(targets, places, strict=True):
                start = self._starts[tensor.name]
                own_start = _Start(start.file, start.offset + _offset(tensor, box))
                files.write(own_start, rows.reshape(-1).view(torch.uint8).cpu().numpy().data)
                num_bytes += rows.nbytes
        self._all(files.close)
        return num_bytes

    def _all[T](self, act: Callable[[], T]) -> list[T]:
        """What `act` returns on each rank. Raises RunError on all of them where one cannot."""
        mine: tuple[Any, str] = (None, "")
        try:
            mine = (act(), "")
        except (OSError, RunError) as error:
            mine = (None, f"trainer rank {self._weights.rank}: {error}")
        everyone: list[Any] = [mine] * len(self._weights.owned)
        if len(everyone) > 1:
            dist.all_gather_object(everyone, mine)
        failures = [failure for _, failure in everyone if failure]
        if failures:
            raise RunError("; ".join(failures))
        return [result for result, _ in everyone]


class _Files:
    """Files of a directory that are open for writing. After an error nothing more is written;
    `close` raises it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._descriptors: dict[str, int] = {}
        self._failure: OSError | None = None

    def write(self, start: _Start, left: memoryview) -> None:
        """Writes all of it; a single call of the system writes 2 GiB at the most."""
        with self._failing_later(start.file):
            if start.file not in self._descriptors:
                path = self._directory / start.file
                self._descriptors[start.file] = os.open(path, os.O_WRONLY)
            offset = start.offset
            while left and self._failure is None:
                written = os.pwrite(self._descriptors[start.file], left, offset)
                left = left[written:]
                offset += written

    def close(self) -> None:
        """A network filesystem says here that its disk is full."""
        for name, descriptor in self._descriptors.items():
            with self._failing_later(name), os.fdopen(descriptor, "wb"):
                os.fsync(descriptor)
        if self._failure is not None:
            raise self._failure

    @contextmanager
    def _failing_later(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            path = str(self._directory / name)
            self._failure = self._failure or OSError(error.errno, error.strerror, path)


def _empty(tensor: PlannedTensor, box: Box, device: torch.device) -> Tensor:
    return torch.empty(lengths(box), dtype=tensor.dtype, device=device)


def _offset(tensor: PlannedTensor, box: Box) -> int:
    """Bytes of the tensor before these rows."""
    if not box or box[0].start == 0:
        return 0
    return tensor.dtype.itemsize * math.prod(tensor.shape[1:]) * box[0].start
