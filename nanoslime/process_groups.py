"""Where process groups meet, and how to join one beside the default one: a trainer rank with the
ranks of engines."""

import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from nanoslime.types import WeightGroup


def listening_store(address: str, port: int, timeout: timedelta) -> dist.TCPStore:
    """A store that listens at `address`, with 0 at a port of its own.

    Torch's own ones listen at all addresses of the machine, and ask nobody for a secret. Raises
    OSError where the port is taken.
    """
    listener = socket.create_server((address, port))
    port = listener.getsockname()[1]
    fd = listener.detach()
    return dist.TCPStore(
        address, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=fd
    )


def shared_store(address: str, timeout_s: float) -> dist.TCPStore:
    """The store where groups meet. Rank 0 of the default group, if there is one, listens at
    `address` and the store's own `.port`; collective over that group.
    """
    timeout = timedelta(seconds=timeout_s)
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    port: list[int | None] = [None]
    store = None
    if is_first:
        store = listening_store(address, 0, timeout)
        port = [store.port]
    if dist.is_initialized():
        dist.broadcast_object_list(port, src=0)
    return store or dist.TCPStore(address, port[0], is_master=False, timeout=timeout)


def one_ahead[T](receives: Iterable[Callable[[], T]]) -> Iterator[T]:
    """What each of these calls receives, while the next one runs in a thread."""
    with ThreadPoolExecutor(1, thread_name_prefix="receive") as thread:
        coming: list[Future[T]] = []
        for receive in receives:
            coming.append(thread.submit(receive))
            if len(coming) > 1:
                yield coming.pop(0).result()
        yield from (last.result() for last in coming)


def join_group(
    store: dist.TCPStore, group: WeightGroup, rank: int, timeout_s: float
) -> dist.ProcessGroup:
    """Joins the group at its `store` as `rank`; with gloo it returns when all members have come.
    NCCL makes its connections in the first call of the group.

    torch has no public function for a group outside the default one. This one is made
    from the same parts as in SGLang's /init_weights_update_group, so that the two meet:
    a TCP store, a prefix that is the group's name, and torch's helper. Raises
    RuntimeError where the others do not come in time.
    """
    options: dict[str, Any] = {
        "group_name": c10d.GroupName(group.name),
        "timeout": timedelta(seconds=timeout_s),
    }
    own_store = dist.PrefixStore(group.name, store)
    joined, _ = c10d._new_process_group_helper(
        group.world_size, rank, [], dist.Backend(group.backend), own_store, **options
    )
    c10d._world.pg_group_ranks[joined] = {i: i for i in range(group.world_size)}
    return joined
