"""Trainer ranks that are processes of this machine's CPU, for benchmarks of weight sync."""

import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from nanoslime.batch import OwnedShard, WeightShard
from nanoslime.config import RunConfig, TrainingConfig
from nanoslime.orchestration.worker import TrainWorker
from nanoslime.processes.ports import free_port
from nanoslime.training.backend import RankEnv, init_process_group
from nanoslime.weight_sync.plan import TrainerWeights

HOST = "127.0.0.1"
# What is slow to import; the fork server imports it once for all processes.
_PRELOAD = (
    "nanoslime.rehearsal",
    "nanoslime.training.fsdp",
    "nanoslime.training.megatron.backend",
    "tools.synthetic_engine",
)


def quick_context() -> Any:
    """Makes processes that begin with torch and the trainers imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOAD))
    return context


class SyntheticWorker(TrainWorker):
    """A rank that holds its shards, and has no model."""

    def __init__(
        self, owned: list[list[OwnedShard]], config: RunConfig, model_dir: Path, env: RankEnv
    ) -> None:
        self.config = config
        self.model_dir = model_dir
        held = []
        for shard in owned[env.rank]:
            shape = [axis.stop - axis.start for axis in shard.box]
            values = torch.ones(shape, dtype=torch.bfloat16)
            held.append(WeightShard(shard.name, shard.full_shape, shard.box, values))
        self._weights = TrainerWeights(
            lambda: held, owned, rank=env.rank, dtype=torch.bfloat16, device=env.torch_device
        )
        self._sender = None


class Ranks:
    """Processes that are trainer ranks, as a SyncSession sees them."""

    address = HOST

    def __init__(self, number: int, make: Callable[[RankEnv], TrainWorker]) -> None:
        """`make` gives each of them its worker."""
        # Of the last sync: seconds of the ranks' methods, as the driver sees them, and of
        # what they did meanwhile.
        self.seconds: dict[str, float] = {}
        self.num_bytes: list[int] = []
        self._ranks = []
        context = quick_context()
        meeting = f"tcp://{HOST}:{free_port(HOST)}"
        for rank in range(number):
            ours, theirs = context.Pipe()
            env = RankEnv(rank, number, rank, "cpu", meeting)
            process = context.Process(target=_serve, args=(make, env, theirs), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))
        self.run(_is_there)

    def call(self, method: str, *args: Any, what: str, deadline_s: float | None = None) -> Any:
        if method == "connect":
            self.seconds = {}
        begin = time.monotonic()
        results = self.run(_call, method, *args)
        self.seconds[method] = time.monotonic() - begin
        if method == "send":
            self.num_bytes = [sent.num_bytes for sent in results]
            # Senders take turns; they fill their buckets side by side.
            for name, over_ranks in (("gather", max), ("wire", sum), ("load", sum)):
                metric = f"time/weight_sync_{name}_s"
                self.seconds[name] = over_ranks(sent.times.get(metric, 0.0) for sent in results)
        return results

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """function(worker, *args) of every rank, side by side."""
        for _, pipe in self._ranks:
            pipe.send((function, args))
        answers = [pipe.recv() for _, pipe in self._ranks]
        for rank, (_, failure) in enumerate(answers):
            if failure:
                raise RuntimeError(f"trainer rank {rank}: {failure}")
        return [answer for answer, _ in answers]

    def close(self) -> None:
        for process, _ in self._ranks:
            process.kill()
            process.join()


def _serve(make: Callable[[RankEnv], TrainWorker], env: RankEnv, pipe: Connection) -> None:
    torch.set_num_threads(1)
    init_process_group(env, TrainingConfig())
    worker = make(env)
    while True:
        function, args = pipe.recv()
        try:
            pipe.send((function(worker, *args), ""))
        except Exception:
            pipe.send((None, traceback.format_exc()))


def _is_there(worker: TrainWorker) -> bool:
    return True


def _call(worker: TrainWorker, method: str, *args: Any) -> Any:
    return getattr(worker, method)(*args)
