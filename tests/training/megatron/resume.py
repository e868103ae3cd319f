"""What ranks do in tests of checkpoints: stop after a step and go on, in any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from nanoslime.algorithms.grpo import GRPO
from nanoslime.weight_sync.plan import TrainerWeights
from tests.training.parity import (
    KL,
    CopiedShard,
    Layout,
    assemble,
    copied,
    largest,
    make_backend,
    train_batch,
)
from tests.weight_sync.gathered import whole_tensors


def interrupted(
    layout: Layout, model_dir: Path, rank: int, tmp: Path, steps: list[dict[str, Any]]
) -> dict[str, Any]:
    """A step, save, a step; a new backend does two steps of its own, loads, does the same step."""
    first = make_backend(layout, model_dir, rank, tmp / "rendezvous")
    batches = [train_batch(step, first.dp_rank, first.dp_size, layout.sequences) for step in steps]
    first.train_step(batches[0], GRPO(KL))
    path = tmp / "checkpoint"
    _make_directory(path, rank)
    first.save(path)
    children = [child.name() for child in psutil.Process().children(recursive=True)]
    saved = _state(first)
    metrics = first.train_step(batches[1], GRPO(KL))
    uninterrupted = {"step": metrics, "state": _state(first)}
    dist.barrier()
    dist.destroy_process_group()

    second = make_backend(layout, model_dir, rank, tmp / "rendezvous-2")
    for batch in reversed(batches):  # twice, so that its step counts differ from the saved ones
        second.train_step(batch, GRPO(KL))
    second.load(path)
    loaded = _state(second)
    metrics = second.train_step(batches[1], GRPO(KL))
    return {
        "children_after_save": children,
        "loaded_is_saved": all(torch.equal(loaded[name], value) for name, value in saved.items()),
        "uninterrupted": uninterrupted,
        "resumed": {"step": metrics, "state": _state(second)},
    }


def reshard(
    layout: Layout, model_dir: Path, rank: int, tmp: Path, steps: list[dict[str, Any]]
) -> dict[str, Any]:
    """A step, save, a step in `layout`; rank 0 alone then loads and does the second step."""
    first = make_backend(layout, model_dir, rank, tmp / "rendezvous")
    batches = [train_batch(step, first.dp_rank, first.dp_size, layout.sequences) for step in steps]
    first.train_step(batches[0], GRPO(KL))
    path = tmp / "checkpoint"
    _make_directory(path, rank)
    first.save(path)
    first.train_step(batches[1], GRPO(KL))
    by_rank = _gathered(copied(first.weight_shards()), layout)
    dist.barrier()
    dist.destroy_process_group()
    if rank != 0:
        return {"difference": 0.0}

    second = make_backend(_alone(layout), model_dir, 0, tmp / "rendezvous-alone")
    second.load(path)
    second.train_step(train_batch(steps[1]), GRPO(KL))
    return {"difference": _difference(copied(second.weight_shards()), by_rank)}


def grow(
    layout: Layout, model_dir: Path, rank: int, tmp: Path, steps: list[dict[str, Any]]
) -> dict[str, Any]:
    """Rank 0 alone does a step, saves, does a step; all then load and do the second step."""
    path = tmp / "checkpoint"
    expected: list[CopiedShard] = []
    if rank == 0:
        first = make_backend(_alone(layout), model_dir, 0, tmp / "rendezvous-alone")
        first.train_step(train_batch(steps[0]), GRPO(KL))
        path.mkdir()
        first.save(path)
        first.train_step(train_batch(steps[1]), GRPO(KL))
        expected = copied(first.weight_shards())
        dist.destroy_process_group()
    second = make_backend(layout, model_dir, rank, tmp / "rendezvous")
    second.load(path)
    batch = train_batch(steps[1], second.dp_rank, second.dp_size, layout.sequences)
    second.train_step(batch, GRPO(KL))
    by_rank = _gathered(copied(second.weight_shards()), layout)
    if rank != 0:
        return {"difference": 0.0}
    return {"difference": _difference(expected, by_rank)}


def sent(
    layout: Layout, model_dir: Path, rank: int, tmp: Path, steps: list[dict[str, Any]]
) -> dict[str, Any]:
    """Whole tensors on rank 0 as a weight sync assembles them, before any step."""
    backend = make_backend(layout, model_dir, rank, tmp / "rendezvous")
    weights = TrainerWeights(
        backend.weight_shards,
        backend.owned_shards(),
        rank=rank,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    return whole_tensors(weights)


def _alone(layout: Layout) -> Layout:
    """One rank with the same optimizer."""
    same = tuple(option for option in layout.options if option[0] == "distributed_optimizer")
    return Layout(options=same)


def _gathered(shards: list[CopiedShard], layout: Layout) -> list[list[CopiedShard]]:
    by_rank: list[Any] = [None] * layout.world_size
    dist.all_gather_object(by_rank, shards)
    return by_rank


def _difference(alone: list[CopiedShard], by_rank: list[list[CopiedShard]]) -> float:
    expected = assemble(alone)
    found = assemble(shard for shards in by_rank for shard in shards)
    assert expected.keys() == found.keys()
    return largest(float((expected[name] - found[name]).abs().max()) for name in found)


def _make_directory(path: Path, rank: int) -> None:
    if rank == 0:
        path.mkdir()
    dist.barrier()


def _state(backend: Any) -> dict[str, torch.Tensor]:
    return {f"{s.name} {s.slices}": s.tensor.clone() for s in backend.weight_shards()}
