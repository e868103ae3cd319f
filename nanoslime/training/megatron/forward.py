"""Logits of the real GPTModel, from Hugging Face or torch_dist files: one process, on the CPU, in float32."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import Tensor

from nanoslime.models.rules import Part
from nanoslime.models.shape import ModelShape
from nanoslime.training.megatron import cpu_compat, weights
from nanoslime.training.megatron.model import gpt_model, model_config
from nanoslime.training.megatron.step import packed_inputs


@torch.no_grad()
def logits(shape: ModelShape, directory: Path, tokens: Tensor) -> Tensor:
    """[T, vocab_size] in float32 for one sequence of `tokens` [T] and the weights in `directory`.

    Raises ValueError for a model that megatron-core cannot compute, and what loading raises for bad files.
    """
    cpu_compat.install()
    cpu = torch.device("cpu")
    with _one_rank():
        gpt = gpt_model(shape, model_config(shape, torch.float32, cpu), cpu, first=True, last=True)
        if (directory / "metadata.json").exists():
            load_torch_dist(gpt, directory)
        else:
            weights.load(weights.bind(gpt, shape, Part()), shape, directory)
        ends = torch.tensor([0, len(tokens)], dtype=torch.int32)
        return gpt.eval()(**packed_inputs(tokens, torch.arange(len(tokens)), ends))[0, :, : shape.vocab_size]


def load_torch_dist(gpt: GPTModel, directory: Path) -> None:
    """This rank's part of the weights in `directory`, read by megatron-core itself; collective.

    The names there say in which layout to ask. Raises megatron-core's CheckpointingException where one lacks.
    """
    keys = dist_checkpointing.load_tensors_metadata(str(directory)).keys()
    layout = {
        "non_homogeneous_layers": any(re.match(r"decoder\.layers\.\d", key) for key in keys),
        "singleton_local_shards": any(key.endswith("linear_fc1.weight_w") for key in keys),
    }
    wanted = gpt.sharded_state_dict(metadata=layout)
    state = {key: value for key, value in wanted.items() if not key.endswith("_extra_state")}  # of FP8
    loaded = dist_checkpointing.load({"model": state}, str(directory))["model"]
    gpt.load_state_dict(loaded | {key: None for key in wanted.keys() - state.keys()})


@contextmanager
def _one_rank() -> Iterator[None]:
    """Process groups of this process alone; none may exist yet, and none exists afterwards."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(0, force_reset_rng=True)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
