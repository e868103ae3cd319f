"""What ranks do in tests of checkpoints: stop after a step and go on, in the same layout or in another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from nanoslime.algorithms.grpo import GRPO
from tests.training.parity import KL, Layout, assemble, copied, make_backend, train_batch


def interrupted(
    layout: Layout, model_dir: Path, rank: int, tmp: Path, steps: list[dict[str, Any]]
) -> dict[str, Any]:
    """A step, save, a step; then a new backend that has done two steps of its own: load, the same step."""
    first = make_backend(layout, model_dir, rank, tmp / "rendezvous")
    batches = [train_batch(step, first.dp_rank, first.dp_size, layout.sequences) for step in steps]
    first.train_step(batches[0], GRPO(KL))
    path = tmp / "checkpoint"
    _directory(path, rank)
    first.save(path)
    children = [child.name() for child in psutil.Process().children(recursive=True)]
    saved = _state(first)
    uninterrupted = {"step": first.train_step(batches[1], GRPO(KL)), "state": _state(first)}
    dist.barrier()
    dist.destroy_process_group()

    second = make_backend(layout, model_dir, rank, tmp / "rendezvous-2")
    for batch in batches[::-1]:  # twice, so that its step counts differ from the saved ones
        second.train_step(batch, GRPO(KL))
    second.load(path)
    loaded = _state(second)
    return {
        "children_after_save": children,
        "loaded_is_saved": all(torch.equal(loaded[name], value) for name, value in saved.items()),
        "uninterrupted": uninterrupted,
        "resumed": {"step": second.train_step(batches[1], GRPO(KL)), "state": _state(second)},
    }


def reshard(
    layout: Layout, model_dir: Path, rank: int, tmp: Path, steps: list[dict[str, Any]]
) -> dict[str, Any]:
    """A step, save, a step in `layout`; rank 0 alone then loads and does the second step for all."""
    first = make_backend(layout, model_dir, rank, tmp / "rendezvous")
    batches = [train_batch(step, first.dp_rank, first.dp_size, layout.sequences) for step in steps]
    first.train_step(batches[0], GRPO(KL))
    path = tmp / "checkpoint"
    _directory(path, rank)
    first.save(path)
    first.train_step(batches[1], GRPO(KL))
    pieces: list[Any] = [None] * layout.world_size
    dist.all_gather_object(pieces, copied(first.weight_shards()))
    dist.barrier()
    dist.destroy_process_group()
    if rank:
        return {"difference": 0.0}

    alone = Layout(options=layout.options)
    second = make_backend(alone, model_dir, 0, tmp / "rendezvous-alone")
    second.load(path)
    second.train_step(train_batch(steps[1]), GRPO(KL))
    mine = assemble(copied(second.weight_shards()))
    theirs = assemble(piece for of_rank in pieces for piece in of_rank)
    return {"difference": max(float((mine[name] - theirs[name]).abs().max()) for name in theirs)}


def _directory(path: Path, rank: int) -> None:
    if rank == 0:
        path.mkdir()
    dist.barrier()


def _state(backend: Any) -> dict[str, torch.Tensor]:
    return {f"{s.name} {s.slices}": s.tensor.clone() for s in backend.weight_shards()}
