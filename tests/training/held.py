"""What every rank of a layout holds, measured, beside what the plan says of it.

Micro-batches are equally long and experts have equally many tokens (routing replay), because
the formulas know the largest of the first and the mean of the second.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanoslime import algorithms
from nanoslime.batch import TrainBatch
from nanoslime.config import RunConfig
from nanoslime.models.parallel_sizes import ParallelDims
from nanoslime.models.shape import ModelShape
from nanoslime.plugins import resolve
from nanoslime.training.backend import RankEnv
from tests.training.parity import BACKENDS, TEMPERATURE, Layout
from tests.training.rank_pool import leave_groups
from tools.saved_tensors import held_by_a_step

# Tokens of the sequences of a micro-batch on each context-parallel rank.
SEQUENCES = (96, 160)
VOCAB_SIZE = 250


def config_for(layout: Layout, shape: ModelShape) -> RunConfig:
    """The layout's configuration, with a budget of the tokens of SEQUENCES."""
    changes: dict[str, Any] = {"max_tokens_per_microbatch": sum(SEQUENCES)}
    if shape.moe:
        changes["routing_replay"] = "R3"
    return layout.config(**changes)


def parallel_dims(layout: Layout, config: RunConfig) -> ParallelDims:
    return ParallelDims(
        tp=layout.tp_size,
        pp=layout.pp_size,
        cp=layout.cp_size,
        ep=config.training.ep_size,
        dp=layout.dp_size,
    )


def held(layout: Layout, model_dir: Path, rank: int, tmp: Path, argument: Any) -> dict[str, Any]:
    """What this rank holds in a train step."""
    shape = ModelShape.read(model_dir)
    config = config_for(layout, shape)
    env = RankEnv(rank, layout.world_size, rank, layout.device, f"file://{tmp / 'rendezvous'}")
    backend = resolve(layout.backend, BACKENDS, "backend")(config, model_dir, env)
    stages = layout.pp_size * layout.vpp_size
    number = 1 if layout.pp_size == 1 else 2 * stages
    batch = full_batch(shape, number, layout.cp_size)
    found = held_by_a_step(backend, batch, algorithms.make(config.algorithm))
    parts = found.parts
    del backend, found
    leave_groups()  # otherwise the threads of all layouts' groups would stay
    return {"held": parts}


def full_batch(shape: ModelShape, number: int, cp_size: int) -> TrainBatch:
    """`number` micro-batches of the same lengths; all but the first token is in the loss."""
    generator = torch.Generator().manual_seed(0)
    lengths = [length * cp_size for length in SEQUENCES] * number
    token_ids = [torch.randint(1, VOCAB_SIZE, (n,), generator=generator) for n in lengths]
    logprobs = [torch.full((n,), -math.log(VOCAB_SIZE)) for n in lengths]
    indices = list(range(len(lengths)))
    per = len(SEQUENCES)
    batch = TrainBatch(
        token_ids=token_ids,
        loss_mask=[torch.arange(n) > 0 for n in lengths],
        rollout_logprobs=logprobs,
        old_logprobs=logprobs,
        ref_logprobs=logprobs,
        advantages=torch.randn(len(lengths), generator=generator).tolist(),
        token_weights=[1.0] * len(lengths),
        microbatches=[indices[i : i + per] for i in range(0, len(indices), per)],
        denominator=float(sum(lengths)),
        num_tokens=sum(lengths),
        num_sequences=len(lengths),
        temperature=TEMPERATURE,
    )
    if shape.moe:
        batch.routed_experts = [_spread(shape, n) for n in lengths]
    return batch


def _spread(shape: ModelShape, length: int) -> Tensor:
    """int16 [length, layers with experts, chosen]: all experts equally often."""
    moe = shape.moe
    assert moe is not None
    chosen = moe.num_experts_per_token
    numbers = torch.arange(length * chosen) % moe.num_experts
    one_layer = numbers.view(length, 1, chosen)
    return one_layer.expand(-1, len(shape.moe_layers), -1).to(torch.int16).contiguous()
