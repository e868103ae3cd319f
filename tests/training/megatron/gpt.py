"""Real GPTModels over gloo ranks, for tests of what megatron-core loads and writes.

    pool(differences, model_dir, directory, Grid(tp=2))  names the tensors that differ on a rank
    pool(save, model_dir, directory, Grid(tp=2), "A")    writes `directory` as megatron-core does
    pool(logits, model_dir, Grid(ep=2), tokens)          what a rank computes

`model_dir` holds Hugging Face files, `directory` torch_dist; the pools are fixtures of
rank_pool.py. `python -m tests.training.megatron.gpt MODEL_DIR DIRECTORY A B C` writes
DIRECTORY/A and so on by megatron-core's own writer, which spawns a manager and
therefore needs a process of its own.
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
from nanoslime.training.megatron.checkpoint import InProcessWriter
from nanoslime.training.megatron.context_parallel import ContextParallelShard
from nanoslime.training.megatron.model import gpt_model, model_config
from nanoslime.training.megatron.packed_sequences import packed_inputs
from tests.training.rank_pool import leave_groups

# How megatron-core names and cuts what it writes: its "content metadata".
LAYOUTS: dict[str, dict[str, Any]] = {
    "A": {},  # layers stacked, where all are alike
    "B": {"non_homogeneous_layers": True},
    "C": {"singleton_local_shards": True},  # gate, up and each expert lie apart too
}


@dataclass(frozen=True)
class Grid:
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int | None = None  # tensor parallelism within an expert; None: as tp

    def partition(self, shape: ModelShape) -> ModelPartition:
        """The part of the model on this rank; needs the process groups of `start`."""
        stage = parallel_state.get_pipeline_model_parallel_rank()
        num_layers = shape.num_layers // self.pp
        experts = None
        if shape.moe:
            num_experts = shape.moe.num_experts // self.ep
            first_expert = parallel_state.get_expert_model_parallel_rank() * num_experts
            experts = range(first_expert, first_expert + num_experts)
        return ModelPartition(
            parallel_state.get_tensor_model_parallel_rank(),
            self.tp,
            layers=range(stage * num_layers, (stage + 1) * num_layers),
            first=stage == 0,
            last=stage == self.pp - 1,
            experts=experts,
            expert_tp=(parallel_state.get_expert_tensor_parallel_rank(), self.etp or self.tp),
        )

    def start(self) -> None:
        """Makes Megatron's groups over all ranks, in place of an earlier grid's."""
        cpu_compat.install()
        leave_groups()
        parallel_state.initialize_model_parallel(
            self.tp,
            self.pp,
            expert_model_parallel_size=self.ep,
            expert_tensor_parallel_size=self.etp,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(0, force_reset_rng=True)


def make(model_dir: Path, grid: Grid) -> tuple[GPTModel, weights.ParameterPieces]:
    """This rank's GPTModel, full of NaN, in the dtype of the checkpoint; and its pieces."""
    grid.start()
    cpu = torch.device("cpu")
    shape = ModelShape.read(model_dir)
    dtypes = {info.dtype for info in read_headers(model_dir).values()}
    dtype = torch.bfloat16 if "BF16" in dtypes else torch.float32
    settings = model_config(
        shape,
        dtype,
        cpu,
        tensor_model_parallel_size=grid.tp,
        pipeline_model_parallel_size=grid.pp,
        expert_model_parallel_size=grid.ep,
        expert_tensor_parallel_size=grid.etp,
    )
    partition = grid.partition(shape)
    gpt = gpt_model(shape, settings, cpu, first=partition.first, last=partition.last)
    parameter_pieces = weights.bind(gpt, shape, partition)
    for _, parameter in parameter_pieces:
        parameter.data.fill_(torch.nan)
    return gpt, parameter_pieces


def differences(
    env: RankEnv, model_dir: Path, directory: Path, grid: Grid, layout: str = "B"
) -> list[str]:
    """The tensors that differ from `model_dir` after megatron-core's own load on this rank."""
    gpt, parameter_pieces = make(model_dir, grid)
    state = {"model": gpt.sharded_state_dict(metadata=_metadata(layout))}
    gpt.load_state_dict(dist_checkpointing.load(state, str(directory))["model"])
    found = read_headers(model_dir)
    wrong = []
    for piece, parameter in parameter_pieces:
        with safe_open(found[piece.hf].file, framework="pt") as tensors:
            expected = tensors.get_slice(piece.hf)[piece.box]
        loaded = parameter.detach()[piece.local]
        if loaded.dtype != expected.dtype or not torch.equal(loaded, expected):
            wrong.append(f"{piece.megatron} <- {piece.hf}")
        if piece.rule.layout == "vocab":
            padding = parameter.detach()[piece.local[0].stop :]
            if padding.abs().sum():
                wrong.append(f"{piece.megatron}: the padding of the vocabulary is not zero")
    return wrong


def save(env: RankEnv, model_dir: Path, directory: Path, grid: Grid, layout: str) -> None:
    """Writes the weights in `model_dir` by dist_checkpointing.save, from all ranks."""
    gpt, parameter_pieces = make(model_dir, grid)
    weights.load(parameter_pieces, ModelShape.read(model_dir), model_dir)
    if dist.get_rank() == 0:
        directory.mkdir()
    dist.barrier()
    _save(gpt, directory, layout, InProcessWriter())


@torch.no_grad()
def logits(env: RankEnv, model_dir: Path, grid: Grid, tokens: list[int]) -> list[list[float]]:
    """[T, padded vocab_size / tp]: what this rank computes in a grid without pipeline."""
    gpt, parameter_pieces = make(model_dir, grid)
    weights.load(parameter_pieces, ModelShape.read(model_dir), model_dir)
    cp_group = parallel_state.get_context_parallel_group()
    cp_shard = ContextParallelShard([len(tokens)], cp_group, 1, torch.device("cpu"))
    inputs = packed_inputs(torch.tensor(tokens), cp_shard, local_spec=True)
    return gpt.eval()(**inputs)[0].tolist()


def _metadata(layout: str) -> dict[str, Any]:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return {**LAYOUTS[layout], "dp_cp_group": group}


def _save(gpt: GPTModel, directory: Path, layout: str, writer: InProcessWriter | None) -> None:
    """Writes by `writer`, or by megatron-core's own."""
    state = gpt.sharded_state_dict(metadata=_metadata(layout))
    dist_checkpointing.save(state, str(directory), writer, content_metadata=LAYOUTS[layout])


def main(model_dir: Path, directory: Path, layouts: list[str]) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    gpt, parameter_pieces = make(model_dir, Grid())
    weights.load(parameter_pieces, ModelShape.read(model_dir), model_dir)
    for layout in layouts:
        (directory / layout).mkdir()
        _save(gpt, directory / layout, layout, None)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
