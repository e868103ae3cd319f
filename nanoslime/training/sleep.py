"""The memory of a trainer rank's tensors, given back while engines have the device.

It works on storages, not tensors: parameters, buffers and optimizer state may be views of
one storage, and all views stay valid. In between, the bytes are on the host: for a GPU in
memory that is pinned once and used again, for a CPU in an unlinked file in TMPDIR.
"""

import tempfile
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import IO, Any

import torch
from torch import Tensor


class DeviceMemory:
    """The memory of one rank. Between `release` and `restore` nobody may touch a tensor."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        # Storages with their sizes in bytes.
        self._kept: dict[torch.UntypedStorage, int] = {}
        self._cleared: dict[torch.UntypedStorage, int] = {}
        # Where the bytes are kept on the host: the first for CUDA, the second for a CPU.
        self._pinned = torch.empty(0, dtype=torch.uint8)
        self._unpin: Callable[[], Any] | None = None
        self._file: IO[bytes] | None = None

    @torch.no_grad()
    def release(self, kept: Iterable[Tensor], cleared: Iterable[Tensor]) -> None:
        """Frees the storages of both. Those of `cleared` are not copied: they become
        zeros.
        """
        assert not self._kept, "asleep already: wake() comes before the next sleep()"
        self._kept = self._storages(kept)
        self._cleared = self._storages(cleared)
        self._copy_to_host()
        for storage in self._kept | self._cleared:
            storage.resize_(0)
        if self._cuda:
            torch.cuda.empty_cache()

    @torch.no_grad()
    def restore(self) -> None:
        """Takes the memory again, with the bytes that `release` kept."""
        assert self._kept, "not asleep: sleep() comes before wake()"
        for storage, num_bytes in (self._kept | self._cleared).items():
            storage.resize_(num_bytes)
        for storage in self._cleared:
            _bytes(storage).zero_()
        self._copy_from_host()
        self._kept = {}
        self._cleared = {}
        self._file = None

    def _storages(self, tensors: Iterable[Tensor]) -> dict[torch.UntypedStorage, int]:
        """The storages on the device, each once, with their sizes in bytes; no empty
        ones.
        """
        found = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            num_bytes = storage.nbytes()
            if num_bytes and tensor.is_cuda == self._cuda:
                found[storage] = num_bytes
        return found

    def _copy_to_host(self) -> None:
        for storage, host in zip(self._kept, self._host_copies(), strict=True):
            host.copy_(_bytes(storage), non_blocking=True)
        self._synchronize()

    def _copy_from_host(self) -> None:
        for storage, host in zip(self._kept, self._host_copies(), strict=True):
            _bytes(storage).copy_(host, non_blocking=True)
        self._synchronize()

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def _host_copies(self) -> tuple[Tensor, ...]:
        """uint8 [nbytes] on the host for each kept storage."""
        sizes = list(self._kept.values())
        return self._host(sum(sizes)).split(sizes)

    def _host(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8: the same memory, or file, at every call between two sleeps.

        Do not keep a file's tensor: while it exists, the bytes are in memory.
        """
        if not self._cuda:
            if self._file is None:
                self._file = tempfile.TemporaryFile()
            path = f"/proc/self/fd/{self._file.fileno()}"
            return torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8)
        if self._pinned.numel() < num_bytes:
            self._pin(num_bytes)
        return self._pinned[:num_bytes]

    def _pin(self, num_bytes: int) -> None:
        """Takes so much memory in place of what was pinned before."""
        if self._unpin is not None:
            self._unpin()
        self._pinned = torch.empty(num_bytes, dtype=torch.uint8)
        self._unpin = pin(self._pinned, self)


def on_host(tensors: Sequence[Tensor], owner: object) -> list[Tensor]:
    """Copies of contiguous tensors in one memory of the host, pinned where they are on a GPU.

    It is pinned as long as `owner` lives.
    """
    # So many bytes each that the next tensor, of any dtype, is aligned.
    sizes = [-(-tensor.nbytes // 64) * 64 for tensor in tensors]
    memory = torch.empty(sum(sizes), dtype=torch.uint8)
    if tensors and tensors[0].is_cuda:
        pin(memory, owner)
    copies = []
    for tensor, place in zip(tensors, memory.split(sizes), strict=True):
        copy = place[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        copies.append(copy.copy_(tensor))
    return copies


def pin(memory: Tensor, owner: object) -> Callable[[], Any]:
    """Pins memory until `owner` is gone, or until the result is called.

    Torch's own allocator would round the size up to a power of two.
    """
    cudart = torch.cuda.cudart()
    address = memory.data_ptr()
    torch.cuda.check_error(cudart.cudaHostRegister(address, memory.nbytes, 0))
    unpin = weakref.finalize(owner, cudart.cudaHostUnregister, address)
    unpin.atexit = False  # the driver may be gone by then
    return unpin


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """[nbytes] uint8, a view of the storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
