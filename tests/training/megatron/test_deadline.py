"""A rank that never comes does not hold the others: each Megatron group has the configured deadline."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from nanoslime.algorithms.grpo import GRPO
from tests.models.hf import save_model
from tests.training.parity import KL, Layout, make_backend, run, train_batch
from tests.training.reference import make_step

pytestmark = [pytest.mark.megatron, pytest.mark.matrix]
DEADLINE_S = 10.0  # also that of the rendezvous, on a busy machine


def absent(
    layout: Layout, model_dir: Path, rank: int, tmp: Path, step: dict[str, Any]
) -> dict[str, Any]:
    """Rank 1 is there until the model is built and then does nothing for longer than the deadline."""
    backend = make_backend(
        layout, model_dir, rank, tmp / "rendezvous", collective_deadline_s=DEADLINE_S
    )
    start, error = time.monotonic(), ""
    if rank == 1:
        time.sleep(2 * DEADLINE_S)
    else:
        try:
            backend.train_step(train_batch(step, backend.dp_rank, backend.dp_size), GRPO(KL))
        except RuntimeError as e:
            error = str(e)
    seconds = time.monotonic() - start
    dist.destroy_process_group()
    return {"error": error, "seconds": seconds}


@pytest.mark.parametrize("layout", [Layout(tp_size=2), Layout(pp_size=2)], ids=str)
def test_a_rank_that_never_comes_ends_the_others_within_the_deadline(layout, tmp_path):
    model_dir = save_model(tmp_path / "model", "llama")
    ((waiting, _),) = run([(layout, model_dir, absent, make_step(model_dir, 0))], tmp_path, 120)
    assert "timed out" in waiting["error"].lower(), waiting
    assert DEADLINE_S - 1 < waiting["seconds"] < 1.9 * DEADLINE_S
