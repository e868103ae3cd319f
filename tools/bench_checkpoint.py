"""Seconds of a save and a load of Megatron's training state by data-parallel ranks on the CPU.

    python tools/bench_checkpoint.py [--gb 1] [--rounds 3] [--directory D]

`gathered` is megatron-core's memory-efficient fully reshardable format: gloo gathers the
optimizer's state on one rank, which writes and hashes everything. `parallel` is what
MegatronBackend does. They take turns, hashes and the way to the disk included. The model is
made up; its float32 parameters have the bytes asked for.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nanoslime.config import ModelConfig, RunConfig
from nanoslime.models.shape import ModelShape
from nanoslime.models.tiny import tiny_qwen3_config
from nanoslime.processes.ports import free_port
from nanoslime.storage import manifest
from nanoslime.training.backend import RankEnv
from nanoslime.training.megatron import checkpoint, cpu_compat, model, optimizer, parallel
from nanoslime.training.skipping import StepHistory

GATHERED = checkpoint._CONTENT | {"distrib_optim_fully_reshardable_mem_efficient": True}
SIZES = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, head_dim=64)
LAYER_BYTES = 4 * (2 * 1024 * 1024 + 2 * 128 * 1024 + 3 * 1024 * 4096)


class Rank:
    def __init__(self, rank: int, num_ranks: int, port: int, num_layers: int) -> None:
        env = RankEnv(rank, num_ranks, rank, "cpu", f"tcp://127.0.0.1:{port}")
        config = RunConfig(model=ModelConfig(dtype="float32"))
        sizes = SIZES | {"num_hidden_layers": num_layers}
        shape = ModelShape.from_config(tiny_qwen3_config() | sizes)
        cpu_compat.install()
        self.rank = rank
        self.ranks = parallel.initialize(config.training, env, 0)
        distributed = model.build(shape, config, self.ranks, env.torch_device)
        self.chunks = [model.unwrap(chunk) for chunk in distributed]
        self.optimizer = optimizer.build(distributed, config)

    def save_gathered(self, path: Path) -> None:
        writer = checkpoint.InProcessWriter()
        checkpoint.dist_checkpointing.save(self._gathered(is_loading=False), str(path), writer)
        if self.rank == 0:
            manifest.write(path)

    @property
    def _trained(self) -> checkpoint.Trained:
        return checkpoint.Trained(self.chunks, self.optimizer, self.ranks)

    def load_gathered(self, path: Path) -> None:
        wanted = self._gathered(is_loading=True)
        loaded = checkpoint.dist_checkpointing.load(wanted, str(path))
        [inner] = self.optimizer.chained_optimizers
        for state in inner.optimizer.state.values():
            del state["step"]  # which megatron-core looks for in the wrong place
        with torch.no_grad():
            inner.load_parameter_state_from_fully_reshardable(loaded["optimizer"]["param_state"])
        self.chunks[0].load_state_dict(loaded["model"])

    def save_parallel(self, path: Path) -> None:
        checkpoint.save(path, self._trained, StepHistory())
        hashes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(hashes, manifest.hash_own(path, self.rank))
        if self.rank == 0:
            manifest.write(path, {name: digest for own in hashes for name, digest in own.items()})

    def load_parallel(self, path: Path) -> None:
        checkpoint.load(path, self._trained)

    def _gathered(self, *, is_loading: bool) -> dict[str, Any]:
        checkpoint._make_state(self.optimizer)
        weights = self.chunks[0].sharded_state_dict(metadata=dict(GATHERED))
        [inner] = self.optimizer.chained_optimizers
        state = inner.sharded_state_dict(weights, is_loading=is_loading, metadata=dict(GATHERED))
        return {"model": weights, "optimizer": state}


def seconds(call: Callable[[Path], None], path: Path) -> float:
    dist.barrier()
    start = time.monotonic()
    call(path)
    dist.barrier()
    return time.monotonic() - start


def run(rank: int, asked: argparse.Namespace, port: int) -> None:
    torch.set_num_threads(1)
    this = Rank(rank, asked.ranks, port, round(asked.gb * 1e9 / LAYER_BYTES))
    for number in range(asked.rounds):
        for name in ("gathered", "parallel"):
            path = asked.directory / f"{name}-{number}"
            if rank == 0:
                path.mkdir()
            save_s = seconds(getattr(this, f"save_{name}"), path)
            load_s = seconds(getattr(this, f"load_{name}"), path)
            if rank == 0:
                gb = sum(file.stat().st_size for file in path.iterdir()) / 1e9
                print(f"| {name} | {gb:.2f} | {save_s:.2f} | {load_s:.2f} |", flush=True)
                shutil.rmtree(path)
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where checkpoints are written")
    asked = parser.parse_args()
    print("| format | GB | save s | load s |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=asked.directory) as directory:
        asked.directory = Path(directory)
        mp.spawn(run, (asked, free_port("127.0.0.1")), nprocs=asked.ranks)
