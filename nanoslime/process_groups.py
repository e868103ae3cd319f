"""A process group whose members are not those of the default group: trainer rank 0 and the engines' ranks."""

from __future__ import annotations

import socket
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


def free_port(address: str) -> int:
    """A TCP port of `address` that was free a moment ago. Bind soon: another process may take it."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def join_group(
    *, address: str, port: int, rank: int, world_size: int, name: str, backend: str, timeout_s: float
) -> dist.ProcessGroup:
    """Joins group `name` as `rank`; returns when all `world_size` members are there. Rank 0 listens at
    address:port.

    torch has no public function for a group outside the default one; this makes it from the same parts as
    SGLang's own /init_weights_update_group (a TCP store, a prefix that is the group's name, torch's helper),
    so the two meet. Raises RuntimeError (dist.DistError) where the others do not come in time.
    """
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(address, port, world_size, is_master=rank == 0, timeout=timeout)
    group, _ = c10d._new_process_group_helper(
        world_size,
        rank,
        [],
        dist.Backend(backend),
        dist.PrefixStore(name, store),
        group_name=c10d.GroupName(name),
        timeout=timeout,
    )
    c10d._world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    return group
