"""Real GPTModels over gloo ranks, for tests of checkpoints: what they load, and what megatron-core writes.

    pool(differences, model_dir, directory, Grid(tp=2))    what a rank loads otherwise than the files say
    pool(save, model_dir, directory, Grid(tp=2), "A")      writes `directory` as megatron-core does
    pool(logits, model_dir, Grid(ep=2), tokens)            what a rank computes

`model_dir` holds Hugging Face files, `directory` torch_dist; the pools are fixtures of rank_pool.py.
`python -m tests.training.megatron.gpt MODEL_DIR DIRECTORY A B C` writes DIRECTORY/A and so on by
megatron-core's own writer, which forks and spawns and therefore needs a process of its own.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from safetensors import safe_open

from nanoslime.models.rules import ModelPartition
from nanoslime.models.shape import ModelShape
from nanoslime.storage.safetensors_file import read_headers
from nanoslime.training.backend import RankEnv
from nanoslime.training.megatron import cpu_compat, weights
from nanoslime.training.megatron.checkpoint import _InProcessWriter
from nanoslime.training.megatron.model import gpt_model, model_config
from nanoslime.training.megatron.step import packed_inputs
from tests.training.rank_pool import leave_groups

LAYOUTS: dict[
    str, dict[str, Any]
] = {  # how megatron-core names and cuts what it writes: "content metadata"
    "A": {},  # layers stacked, where all are alike
    "B": {"non_homogeneous_layers": True},
    "C": {"singleton_local_shards": True},  # also gate, up and each expert apart
}


@dataclass(frozen=True)
class Grid:
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int | None = None  # tensor parallelism within an expert; None: as tp

    def part(self, shape: ModelShape) -> ModelPartition:
        """What this rank holds by the weight map; needs the process groups of `start`."""
        tp, pp = (parallel_state.get_tensor_model_parallel_rank(), self.tp), self.pp
        stage, layers = parallel_state.get_pipeline_model_parallel_rank(), shape.num_layers // pp
        experts = (shape.moe.num_experts if shape.moe else 0) // self.ep
        ep_rank = parallel_state.get_expert_model_parallel_rank()
        return ModelPartition(
            *tp,
            layers=range(stage * layers, (stage + 1) * layers),
            first=stage == 0,
            last=stage == pp - 1,
            experts=range(ep_rank * experts, (ep_rank + 1) * experts) if shape.moe else None,
            expert_tp=(parallel_state.get_expert_tensor_parallel_rank(), self.etp or self.tp),
        )

    def start(self) -> None:
        """Megatron's groups over all ranks, in place of an earlier grid's."""
        cpu_compat.install()
        leave_groups()
        parallel_state.initialize_model_parallel(
            self.tp,
            self.pp,
            expert_model_parallel_size=self.ep,
            expert_tensor_parallel_size=self.etp,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(0, force_reset_rng=True)


def make(model_dir: Path, grid: Grid) -> tuple[GPTModel, weights.Bound]:
    """This rank's GPTModel, full of NaN, in the dtype of the checkpoint; and its pieces."""
    grid.start()
    shape = ModelShape.read(model_dir)
    dtypes = {info.dtype for info in read_headers(model_dir).values()}
    dtype = torch.bfloat16 if "BF16" in dtypes else torch.float32
    sizes = dict(tensor_model_parallel_size=grid.tp, pipeline_model_parallel_size=grid.pp)
    sizes |= dict(expert_model_parallel_size=grid.ep, expert_tensor_parallel_size=grid.etp)
    settings = model_config(shape, dtype, torch.device("cpu"), **sizes)
    part = grid.part(shape)
    gpt = gpt_model(shape, settings, torch.device("cpu"), first=part.first, last=part.last)
    bound = weights.bind(gpt, shape, part)
    for _, parameter in bound:
        parameter.data.fill_(torch.nan)
    return gpt, bound


def differences(
    env: RankEnv, model_dir: Path, directory: Path, grid: Grid, layout: str = "B"
) -> list[str]:
    """Names of what megatron-core's own load puts on this rank other than `model_dir` says, bit for bit."""
    gpt, bound = make(model_dir, grid)
    state = {"model": gpt.sharded_state_dict(metadata=_metadata(layout))}
    gpt.load_state_dict(dist_checkpointing.load(state, str(directory))["model"])
    found = read_headers(model_dir)
    wrong = []
    for piece, parameter in bound:
        with safe_open(found[piece.hf].file, framework="pt") as tensors:
            expected = tensors.get_slice(piece.hf)[piece.box]
        mine = parameter.detach()[piece.local]
        if mine.dtype != expected.dtype or not torch.equal(mine, expected):
            wrong.append(f"{piece.megatron} <- {piece.hf}")
        if piece.rule.layout == "vocab" and parameter.detach()[piece.local[0].stop :].abs().sum():
            wrong.append(f"{piece.megatron}: the padding of the vocabulary is not zero")
    return wrong


def save(env: RankEnv, model_dir: Path, directory: Path, grid: Grid, layout: str) -> None:
    """The weights in `model_dir` by dist_checkpointing.save, from all ranks."""
    gpt, bound = make(model_dir, grid)
    weights.load(bound, ModelShape.read(model_dir), model_dir)
    if dist.get_rank() == 0:
        directory.mkdir()
    dist.barrier()
    _save(gpt, directory, layout, _InProcessWriter())


@torch.no_grad()
def logits(env: RankEnv, model_dir: Path, grid: Grid, tokens: list[int]) -> list[list[float]]:
    """[T, padded vocab_size / tp] that this rank of a grid without pipeline computes from `model_dir`."""
    gpt, bound = make(model_dir, grid)
    weights.load(bound, ModelShape.read(model_dir), model_dir)
    ends = torch.tensor([0, len(tokens)], dtype=torch.int32)
    inputs = packed_inputs(torch.tensor(tokens), torch.arange(len(tokens)), ends)
    return gpt.eval()(**inputs)[0].tolist()


def _metadata(layout: str) -> dict[str, Any]:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return {**LAYOUTS[layout], "dp_cp_group": group}


def _save(gpt: GPTModel, directory: Path, layout: str, writer: Any) -> None:
    state = gpt.sharded_state_dict(metadata=_metadata(layout))
    dist_checkpointing.save(state, str(directory), writer, content_metadata=LAYOUTS[layout])


if __name__ == "__main__":
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model, pieces_here = make(source, Grid())
    weights.load(pieces_here, ModelShape.read(source), source)
    for name in sys.argv[3:]:
        (target / name).mkdir()
        _save(model, target / name, name, None)
    dist.destroy_process_group()
