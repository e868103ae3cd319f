"""Joins a process group beside the default one: trainer rank 0 with the ranks of engines."""

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


def listen(address: str, timeout_s: float) -> dist.TCPStore:
    """Opens the store where a group meets; it listens at `address` and its own `.port`."""
    timeout = timedelta(seconds=timeout_s)
    return dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=timeout)


def join_group(
    store: dist.TCPStore, *, rank: int, world_size: int, name: str, backend: str, timeout_s: float
) -> dist.ProcessGroup:
    """Joins group `name` at `store` as `rank`; returns when all `world_size` members have come.

    torch has no public function for a group outside the default one. This one is made
    from the same parts as in SGLang's /init_weights_update_group, so that the two meet:
    a TCP store, a prefix that is the group's name, and torch's helper. Raises
    RuntimeError where the others do not come in time.
    """
    options: dict[str, Any] = {
        "group_name": c10d.GroupName(name),
        "timeout": timedelta(seconds=timeout_s),
    }
    group, _ = c10d._new_process_group_helper(
        world_size, rank, [], dist.Backend(backend), dist.PrefixStore(name, store), **options
    )
    c10d._world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    return group
