"""A process group whose members are not those of the default group: trainer rank 0 and the engines' ranks."""

import random
import socket
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from nanoslime.types import RunError

_PORTS = range(
    10_000, 20_000
)  # below the ephemeral range (32768 and up): outgoing connections take those


def free_port(address: str) -> int:
    """A TCP port that nobody on this host listens on, for a server at `address` that binds it soon."""
    for port in random.SystemRandom().sample(_PORTS, 50):
        with socket.socket() as everywhere, socket.socket() as here:
            try:
                here.bind((address, port))
                here.close()
                everywhere.bind(("", port))
            except OSError:
                continue
            return port
    raise RunError(f"no free port on {address}: 50 of {_PORTS.start} to {_PORTS.stop} were tried")


def listen(address: str, timeout_s: float) -> dist.TCPStore:
    """The store where a group meets, listening at `address` and its `.port` before anybody is told of it."""
    timeout = timedelta(seconds=timeout_s)
    return dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=timeout)


def join_group(
    store: dist.TCPStore, *, rank: int, world_size: int, name: str, backend: str, timeout_s: float
) -> dist.ProcessGroup:
    """Joins group `name` at `store` as `rank`; returns when all `world_size` members are there.

    torch has no public function for a group outside the default one; this makes it from the same parts as
    SGLang's own /init_weights_update_group (a TCP store, a prefix that is the group's name, torch's helper),
    so that the two meet. Raises RuntimeError where the others do not come in time.
    """
    there, kind = dist.PrefixStore(name, store), dist.Backend(backend)
    options: dict[str, Any] = {
        "group_name": c10d.GroupName(name),
        "timeout": timedelta(seconds=timeout_s),
    }
    group, _ = c10d._new_process_group_helper(world_size, rank, [], kind, there, **options)
    c10d._world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    return group
