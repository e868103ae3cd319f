"""The memory of a trainer rank's tensors, given back while engines have the device, and taken again.

It works on storages, not tensors: parameters, buffers and optimizer state may be views of one storage, and
all views stay valid. Meanwhile the bytes are on the host: beside a GPU in memory that is pinned once and used
again, for a CPU in an unlinked file in TMPDIR.
"""

import tempfile
from collections.abc import Iterable
from typing import IO

import torch
from torch import Tensor


class DeviceMemory:
    """Of one rank. Between `release` and `restore` none of its tensors may be touched."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._kept: dict[torch.UntypedStorage, int] = {}  # with their sizes in bytes
        self._cleared: dict[torch.UntypedStorage, int] = {}
        self._pinned = torch.empty(0, dtype=torch.uint8)
        self._file: IO[bytes] | None = None

    @torch.no_grad()
    def release(self, kept: Iterable[Tensor], cleared: Iterable[Tensor]) -> None:
        """Frees the storages of both; those of `cleared` come back as zeros, and need no copy."""
        if self._kept:
            raise RuntimeError("asleep already: wake() comes before the next sleep()")
        self._kept, self._cleared = self._storages(kept), self._storages(cleared)
        self._copy(to_host=True)
        for storage in self._kept | self._cleared:
            storage.resize_(0)
        if self._cuda:
            torch.cuda.empty_cache()

    @torch.no_grad()
    def restore(self) -> None:
        if not self._kept:
            raise RuntimeError("not asleep: sleep() comes before wake()")
        for storage, num_bytes in (self._kept | self._cleared).items():
            storage.resize_(num_bytes)
        for storage in self._cleared:
            _bytes(storage).zero_()
        self._copy(to_host=False)
        self._kept, self._cleared, self._file = {}, {}, None

    def _storages(self, tensors: Iterable[Tensor]) -> dict[torch.UntypedStorage, int]:
        found = (t.untyped_storage() for t in tensors if t.is_cuda == self._cuda)
        return {storage: storage.nbytes() for storage in found if storage.nbytes()}

    def _copy(self, *, to_host: bool) -> None:
        sizes = list(self._kept.values())
        for storage, host in zip(self._kept, self._host(sum(sizes)).split(sizes), strict=True):
            here = _bytes(storage)
            (host if to_host else here).copy_(here if to_host else host, non_blocking=True)
        if self._cuda:
            torch.cuda.synchronize()

    def _host(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8, what was written the last time. A file's is not to be kept: it is resident."""
        if not self._cuda:
            self._file = self._file or tempfile.TemporaryFile()
            path = f"/proc/self/fd/{self._file.fileno()}"
            return torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8)
        if (
            self._pinned.numel() < num_bytes
        ):  # torch's pinned allocator would round up to a power of two
            cudart = torch.cuda.cudart()
            if self._pinned.numel():
                torch.cuda.check_error(cudart.cudaHostUnregister(self._pinned.data_ptr()))
            self._pinned = torch.empty(num_bytes, dtype=torch.uint8)
            torch.cuda.check_error(cudart.cudaHostRegister(self._pinned.data_ptr(), num_bytes, 0))
        return self._pinned[:num_bytes]


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """[nbytes] uint8, a view of the storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
