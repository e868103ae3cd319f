"""What ranks hold is what the plan says, in every layout of the parity matrix.

The predicted bytes of weights, gradients and optimizer state are the measured ones to 1%, those
of activations to 10%; the table that the matrix prints belongs in tests/RESULTS.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from nanoslime.models.shape import ModelShape
from tests.models.hf import save_model
from tests.training import parity
from tests.training.held import SEQUENCES, config_for, held, parallel_dims
from tests.training.parity import Job, Layout
from tests.training.test_parity import (
    ALONE,
    CP2,
    DP2_DISTRIBUTED,
    FSDP2,
    MATRIX,
    PP2,
    RECOMPUTE,
    SEQUENCE_PARALLEL,
    TP2,
    TP2_EP2,
    VPP2,
    label,
)
from tools.memory.activations import Microbatch, activations_of_ranks
from tools.memory.states import states_of_ranks

pytestmark = pytest.mark.megatron

Case = tuple[str, Layout]
# Larger than the models of the parity tests, so that a hidden state is not as small as a score.
SIZES = dict(
    hidden_size=64,
    intermediate_size=160,
    num_attention_heads=8,
    max_position_embeddings=4096,
)
# Latent attention takes no number of these.
GROUPS = dict(num_key_value_heads=4, head_dim=16)

ONCE: list[Case] = [
    ("qwen3", replace(TP2, options=SEQUENCE_PARALLEL)),
    ("qwen3", replace(VPP2, dtype="bfloat16")),
    ("qwen3", Layout(backend="fsdp", dp_size=2, options=RECOMPUTE, dtype="bfloat16")),
]


def distinct(cases: list[Case]) -> list[Case]:
    """Each family and layout once; the algorithm and the number of sequences matter nothing."""
    found = {}
    for family, layout in cases:
        family = family.removesuffix("_idle")
        found[family, replace(layout, algorithm="grpo", sequences=None)] = None
    return list(found)


# Once more in half precision.
HALF: list[Case] = [
    ("qwen3", ALONE),
    ("qwen3", replace(TP2, options=SEQUENCE_PARALLEL)),
    ("qwen3", CP2),
    ("qwen3", PP2),
    ("qwen3", DP2_DISTRIBUTED),
    ("qwen3", replace(PP2, options=RECOMPUTE)),
    ("qwen3", FSDP2),
    ("llama", CP2),
    ("qwen3_moe", TP2_EP2),
    ("glm4_moe", TP2_EP2),
    ("deepseek_v3", TP2_EP2),
]
MATRIX_OF_BYTES = distinct(MATRIX)
MATRIX_OF_BYTES += [(family, replace(layout, dtype="bfloat16")) for family, layout in HALF]
# So many layouts are run by one set of processes.
AT_ONCE = 24


@dataclass(frozen=True)
class Figures:
    """Predicted and measured bytes of a rank, by part."""

    rank: int
    predicted: dict[str, int]
    measured: dict[str, int]

    def ratio(self, part: str) -> float:
        return self.predicted[part] / self.measured[part]


def model_of(family: str, directory: Path) -> Path:
    kind, _, num_layers = family.partition("_layers")
    sizes: dict[str, Any] = dict(SIZES)
    if not kind.startswith("deepseek"):
        sizes.update(GROUPS)
    if num_layers:
        sizes["num_hidden_layers"] = int(num_layers)
    return save_model(directory / family, kind, **sizes)


def measure(cases: list[Case], tmp: Path, deadline_s: float) -> dict[Case, list[Figures]]:
    models: dict[str, Path] = {}
    jobs = []
    for family, layout in cases:
        if family not in models:
            models[family] = model_of(family, tmp)
        jobs.append(Job(layout, models[family], held, None))
    results = parity.run(jobs, tmp, deadline_s)
    found = {}
    for case, job, ranks in zip(cases, jobs, results, strict=True):
        shape = ModelShape.read(job.model_dir)
        predicted = predict(job.layout, shape)
        ranks_of_stage = job.layout.world_size // job.layout.pp_size
        found[case] = [
            Figures(rank, predicted[rank // ranks_of_stage], result["held"])
            for rank, result in enumerate(ranks)
        ]
    return found


def predict(layout: Layout, shape: ModelShape) -> list[dict[str, int]]:
    """[pp_size]: bytes by part."""
    config = config_for(layout, shape)
    parallel = parallel_dims(layout, config)
    tokens = sum(SEQUENCES)
    # Scores of a sequence grow with its square.
    length = layout.cp_size * sum(n * n for n in SEQUENCES) // tokens
    activations = activations_of_ranks(config, shape, parallel, Microbatch(tokens, length))
    found = []
    states = states_of_ranks(config, shape, parallel)
    for of_rank, kept in zip(states, activations, strict=True):
        found.append(
            {
                "weights": of_rank.weights,
                "gradients": of_rank.gradients,
                "optimizer": of_rank.optimizer,
                "activations": kept,
            }
        )
    return found


def assert_close(figures: list[Figures]) -> None:
    for one in figures:
        for part in ("weights", "gradients", "optimizer"):
            assert one.ratio(part) == pytest.approx(1, abs=0.01), (one.rank, part)
        assert one.ratio("activations") == pytest.approx(1, abs=0.1), one.rank


@pytest.fixture(scope="module")
def once(tmp_path_factory) -> dict[Case, list[Figures]]:
    return measure(ONCE, tmp_path_factory.mktemp("held"), deadline_s=120)


@pytest.mark.parametrize("case", ONCE, ids=label)
def test_a_rank_holds_what_the_plan_says(once, case):
    assert_close(once[case])


@pytest.fixture(scope="module")
def matrix(tmp_path_factory) -> dict[Case, list[Figures]]:
    found = {}
    for start in range(0, len(MATRIX_OF_BYTES), AT_ONCE):
        cases = MATRIX_OF_BYTES[start : start + AT_ONCE]
        found.update(measure(cases, tmp_path_factory.mktemp("matrix"), deadline_s=400))
    return found


@pytest.mark.matrix
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("case", MATRIX_OF_BYTES, ids=label)
def test_every_rank_of_the_matrix_holds_what_the_plan_says(matrix, case):
    for one in matrix[case]:
        states = [one.ratio(part) for part in ("weights", "gradients", "optimizer")]
        print(
            f"| {label(case)} | {one.rank} | "
            f"{' | '.join(f'{ratio:.3f}' for ratio in states)} | {one.predicted['activations']:,} "
            f"| {one.measured['activations']:,} | {one.ratio('activations'):.3f} |"
        )
    assert_close(matrix[case])
