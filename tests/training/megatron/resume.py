"""What ranks do in tests of checkpoints: stop after a step and go on, in the same layout or in another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from nanoslime.algorithms.grpo import GRPO
from nanoslime.weight_sync.assemble import Assembler
from tests.training.parity import KL, Layout, assemble, copied, largest, make_backend, train_batch


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

    second = make_backend(_alone(layout), model_dir, 0, tmp / "rendezvous-alone")
    second.load(path)
    second.train_step(train_batch(steps[1]), GRPO(KL))
    return {"difference": _difference(copied(second.weight_shards()), pieces)}


def grow(
    layout: Layout, model_dir: Path, rank: int, tmp: Path, steps: list[dict[str, Any]]
) -> dict[str, Any]:
    """The other way: rank 0 alone does a step, saves, does a step; all then load and do the second step."""
    path, expected = tmp / "checkpoint", []
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
    pieces: list[Any] = [None] * layout.world_size
    dist.all_gather_object(pieces, copied(second.weight_shards()))
    return {"difference": 0.0 if rank else _difference(expected, pieces)}


def sent(
    layout: Layout, model_dir: Path, rank: int, tmp: Path, steps: list[dict[str, Any]]
) -> dict[str, Any]:
    """Whole tensors on rank 0 as a weight sync assembles them, before any step."""
    backend = make_backend(layout, model_dir, rank, tmp / "rendezvous")
    place = {"rank": rank, "world_size": layout.world_size, "device": torch.device("cpu")}
    return dict(Assembler(backend.weight_shards, dtype=torch.float32, **place).tensors())


def _alone(layout: Layout) -> Layout:
    """One rank with the same optimizer."""
    return Layout(
        options=tuple(item for item in layout.options if item[0] == "distributed_optimizer")
    )


def _difference(mine: list[Any], by_rank: list[Any]) -> float:
    whole, theirs = assemble(mine), assemble(piece for of_rank in by_rank for piece in of_rank)
    assert whole.keys() == theirs.keys()
    return largest(float((whole[name] - theirs[name]).abs().max()) for name in theirs)


def _directory(path: Path, rank: int) -> None:
    if rank == 0:
        path.mkdir()
    dist.barrier()


def _state(backend: Any) -> dict[str, torch.Tensor]:
    return {f"{s.name} {s.slices}": s.tensor.clone() for s in backend.weight_shards()}
