"""Memory of one process in another, and what is left of it when either ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanoslime.shared_bytes import SharedBytes, shared_bytes
from nanoslime.types import RunError

NUM_BYTES = 100_000
OWNER = f"""
import torch
from nanoslime.shared_bytes import SharedBytes
shared = SharedBytes({NUM_BYTES})
shared.tensor.fill_(5)
print(*shared.handle({NUM_BYTES}), flush=True)
input()
shared.tensor.fill_(6)
print("changed", flush=True)
input()
"""


def test_bytes_of_another_process_are_seen_and_outlive_its_death_only_where_they_are_mapped() -> (
    None
):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdin is not None and owner.stdout is not None
    path, *numbers = owner.stdout.readline().split()
    device, inode, num_bytes = map(int, numbers)
    handle = (path, device, inode, num_bytes)
    mapped = shared_bytes(handle)
    found = os.stat(path)
    assert found.st_nlink == 0, "it has no name that could be left in a directory"
    assert found.st_mode & 0o777 == 0o600
    assert mapped.shape == (NUM_BYTES,) and torch.all(mapped == 5)
    owner.stdin.write("\n")
    owner.stdin.flush()
    assert owner.stdout.readline() == "changed\n"
    assert torch.all(mapped == 6)
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    assert torch.all(mapped == 6)
    refusal = "memory of a trainer rank cannot be opened as .*No such file.*: an engine needs the"
    with pytest.raises(RunError, match=refusal):
        shared_bytes(handle)


def test_memory_is_free_once_neither_side_has_it() -> None:
    shared = SharedBytes(NUM_BYTES)
    inode = shared.handle(1)[2]
    mapped = shared_bytes(shared.handle(300))
    shared.tensor.fill_(7)
    del shared
    assert mapped.tolist() == [7] * 300
    assert is_mapped(inode)
    del mapped
    assert not is_mapped(inode)


def is_mapped(inode: int) -> bool:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return any(line.split()[4] == str(inode) for line in lines)


def test_a_descriptor_that_names_another_file_by_now_is_refused() -> None:
    """As where the owner has begun another update, or has its number in a namespace of its own."""
    first = SharedBytes(NUM_BYTES)
    second = SharedBytes(NUM_BYTES)
    [_, *is_first] = first.handle(NUM_BYTES)
    [path, *_] = second.handle(NUM_BYTES)
    with pytest.raises(RunError, match=r"cannot be opened as /proc/\d+/fd/\d+ .it is another file"):
        shared_bytes((path, *is_first))
