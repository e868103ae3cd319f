"""A process group whose members are not those of the default group: trainer rank 0 and the engines' ranks."""

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


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
