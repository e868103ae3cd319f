"""Bytes in ordinary memory that two processes of one machine share; trainers and engines know it.

They are a file without a name (memfd_create), which another process of the same user opens below
/proc. Nothing of it lies in a directory: the kernel frees it with the last process that has it
open or mapped, whatever ends them, and the size of /dev/shm is no limit. Torch's own ways do not
serve here: one passes a descriptor over a socket to which only children have the key, the other
leaves a file in /dev/shm where both of its processes and torch's manager are killed.
"""

import os
import weakref

import torch
from torch import Tensor

from nanoslime.types import RunError

# Where the file is opened, its device and inode, and the bytes that are meant of it.
Handle = tuple[str, int, int, int]


class SharedBytes:
    """Bytes of this process, uint8 [num_bytes], for as long as this object is there."""

    def __init__(self, num_bytes: int) -> None:
        descriptor = os.memfd_create("nanoslime")
        weakref.finalize(self, os.close, descriptor)
        os.fchmod(descriptor, 0o600)
        os.ftruncate(descriptor, num_bytes)
        self._path = f"/proc/{os.getpid()}/fd/{descriptor}"
        self.tensor = _map(self._path, num_bytes)

    def handle(self, num_bytes: int) -> Handle:
        """What `shared_bytes` takes elsewhere, for the first `num_bytes`."""
        found = os.stat(self._path)
        return self._path, found.st_dev, found.st_ino, num_bytes


def shared_bytes(handle: Handle) -> Tensor:
    """Another process's bytes, uint8 [num_bytes], which stay while the tensor does.

    Raises RunError where this process cannot see them.
    """
    path, device, inode, num_bytes = handle
    try:
        found = os.stat(path)
        if (found.st_dev, found.st_ino) != (device, inode):
            raise OSError("it is another file")
        return _map(path, num_bytes)
    except (OSError, RuntimeError) as e:
        raise RunError(
            f"memory of a trainer rank cannot be opened as {path} ({e}): an engine needs the same "
            "machine, user and PID namespace for it, or set weight_sync.transport to disk"
        ) from e


def _map(path: str, num_bytes: int) -> Tensor:
    return torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8)
