"""Processes that are the ranks of one gloo group and run functions together, for many tests."""

import gc
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nanoslime.config import TrainingConfig
from nanoslime.processes.ports import free_port
from nanoslime.training.backend import RankEnv, init_process_group

DEADLINE_S = 120.0
_PRELOAD = [
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.modeling_layers",
    "tests.training.megatron.gpt",
]

# The pools that the present test has used.
_used: set["RankPool"] = set()


class RankPool:
    """`pool(fn, *args)` calls fn(env, *args) on every rank; it returns results by rank.

    `fn` is a module-level function. A rank that raises, dies or is late fails the call
    with its name. A backend that a call leaves in a rank serves the calls of one test;
    after the test its process groups end.
    """

    def __init__(self, size: int, device: Literal["cpu", "cuda"] = "cpu") -> None:
        self._size = size
        self._device = device
        self._start()

    def _start(self) -> None:
        port = free_port("127.0.0.1")
        # The fork server imports what is slow to import once, for all pools. Some of these
        # imports use CUDA, after which a forked process could not.
        context = mp.get_context("spawn" if self._device == "cuda" else "forkserver")
        if self._device == "cpu":
            context.set_forkserver_preload(_PRELOAD)
        self._ranks = []
        for rank in range(self._size):
            ours, theirs = context.Pipe()
            env = RankEnv(
                rank=rank,
                world_size=self._size,
                local_rank=rank,
                device=self._device,
                init_method=f"tcp://127.0.0.1:{port}",
            )
            process = context.Process(target=_serve, args=(env, theirs), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def __call__(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        _used.add(self)
        for _, pipe in self._ranks:
            pipe.send((fn, args))
        replies = []
        for rank, (_, pipe) in enumerate(self._ranks):
            if not pipe.poll(DEADLINE_S):
                self.restart()  # a reply that still comes would be taken for a later one
                raise TimeoutError(f"rank {rank} did not finish {fn.__name__} in {DEADLINE_S} s")
            replies.append(pipe.recv())
        results = []
        for rank, (succeeded, value) in enumerate(replies):
            if not succeeded:
                raise AssertionError(f"rank {rank}:\n{value}")
            results.append(value)
        return results

    def restart(self) -> None:
        self.close()
        self._start()

    def close(self) -> None:
        _used.discard(self)
        for _, pipe in self._ranks:
            pipe.close()
        for process, _ in self._ranks:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join(5)


def _serve(env: RankEnv, pipe: Any) -> None:
    torch.set_num_threads(1)
    config = TrainingConfig(start_deadline_s=DEADLINE_S, collective_deadline_s=DEADLINE_S)
    init_process_group(env, config)
    gc.freeze()  # collections need not look at what was imported
    while True:
        try:
            fn, args = pipe.recv()
        except EOFError:
            dist.destroy_process_group()
            return
        try:
            pipe.send((True, fn(env, *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


def leave_groups(env: RankEnv | None = None) -> None:
    """Ends all groups but the default one.

    Each of them keeps threads that wake up, hundreds in all.
    """
    dist.barrier()  # all ranks are done with them
    if not _groups():
        return
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is not None:
        parallel_state.destroy_model_parallel()
    gc.collect()  # objects that nothing uses may still hold groups
    for group in _groups():  # megatron-core has ended some
        dist.destroy_process_group(group)


def _groups() -> list[dist.ProcessGroup]:
    groups = dist.distributed_c10d._world.pg_map
    return [group for group in groups if group is not dist.group.WORLD]


@pytest.fixture(autouse=True)
def _groups_end_with_the_test() -> Iterator[None]:
    yield
    for pool in list(_used):
        try:
            pool(leave_groups)
        except Exception:  # after a test that failed, or stopped a rank
            pool.restart()
    _used.clear()


@pytest.fixture(scope="session")
def one_rank() -> Iterator[RankPool]:
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankPool]:
    pool = RankPool(4)
    yield pool
    pool.close()
