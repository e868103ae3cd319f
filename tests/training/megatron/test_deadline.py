"""A rank that never comes does not hold the others: each Megatron group has a deadline."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from nanoslime.algorithms.grpo import GRPO
from tests.models.hf import save_model
from tests.training.parity import KL, Job, Layout, make_backend, run, train_batch
from tests.training.reference import make_step

pytestmark = [pytest.mark.megatron, pytest.mark.matrix]
DEADLINE_S = 10.0  # also that of the rendezvous, on a busy machine


def absent(
    layout: Layout, model_dir: Path, rank: int, tmp: Path, step: dict[str, Any]
) -> dict[str, Any]:
    """Rank 1 helps to build the model, and then does nothing until rank 0 has given up."""
    backend = make_backend(
        layout, model_dir, rank, tmp / "rendezvous", collective_deadline_s=DEADLINE_S
    )
    gave_up = tmp / "rank 0 gave up"
    start = time.monotonic()
    error = ""
    if rank == 0:
        batch = train_batch(step, backend.dp_rank, backend.dp_size)
        try:
            backend.train_step(batch, GRPO(KL))
        except RuntimeError as e:
            error = str(e)
        gave_up.touch()
    else:
        while not gave_up.exists() and time.monotonic() < start + 2 * DEADLINE_S:
            time.sleep(0.05)
    seconds = time.monotonic() - start
    dist.destroy_process_group()
    return {"error": error, "seconds": seconds}


@pytest.mark.parametrize("layout", [Layout(tp_size=2), Layout(pp_size=2)], ids=str)
def test_a_rank_that_never_comes_ends_the_others_within_the_deadline(layout, tmp_path):
    model_dir = save_model(tmp_path / "model", "llama")
    job = Job(layout, model_dir, absent, make_step(model_dir, 0))
    [[waiting, _]] = run([job], tmp_path, deadline_s=120)
    assert "timed out" in waiting["error"].lower(), waiting
    assert DEADLINE_S - 1 < waiting["seconds"] < 1.9 * DEADLINE_S
