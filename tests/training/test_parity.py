"""Every backend in every layout trains as plain PyTorch in one process does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.models.hf import save_model
from tests.training import parity
from tests.training.megatron.resume import grow, interrupted, reshard, sent
from tests.training.megatron.test_architectures import changes
from tests.training.megatron.test_backend import rewrite
from tests.training.parity import LENGTHS, NUM_STEPS, Layout, Outcome, assert_parity, collect, train
from tests.training.reference import make_step, reference

pytestmark = pytest.mark.megatron

DISTRIBUTED = (("distributed_optimizer", True),)
ALONE, TP2, PP2, DP2 = Layout(), Layout(tp_size=2), Layout(pp_size=2), Layout(dp_size=2)
TP2_PP2 = Layout(tp_size=2, pp_size=2)
TP2_PP2_DISTRIBUTED = Layout(tp_size=2, pp_size=2, options=DISTRIBUTED)
DP2_DISTRIBUTED = Layout(dp_size=2, options=DISTRIBUTED)
TP2_DP2_DISTRIBUTED = Layout(tp_size=2, dp_size=2, options=DISTRIBUTED)
PP2_DP2 = Layout(pp_size=2, dp_size=2)
CP2, VPP2 = Layout(cp_size=2), Layout(pp_size=2, vpp_size=2, sequences=2)
TP2_DP2, TP2_CP2 = Layout(tp_size=2, dp_size=2), Layout(tp_size=2, cp_size=2)
CP2_DISTRIBUTED = Layout(cp_size=2, options=DISTRIBUTED)
SEQUENCE_PARALLEL = (("sequence_parallel", True),)
RECOMPUTE = (("recompute", True),)
EP2, ETP2 = (("ep_size", 2),), (("etp_size", 2),)
EP2_DISTRIBUTED = Layout(dp_size=2, options=EP2 + DISTRIBUTED)
IDLE = "glm4_moe_idle"  # half of the experts, which are one rank's, get no token at all

EXPERTS = [
    DP2,
    Layout(tp_size=2, options=SEQUENCE_PARALLEL),
    Layout(tp_size=2, options=SEQUENCE_PARALLEL + EP2),
    Layout(tp_size=2, options=SEQUENCE_PARALLEL + ETP2),
    Layout(dp_size=2, options=EP2),
    Layout(dp_size=2, options=ETP2),
    EP2_DISTRIBUTED,
    Layout(pp_size=2, dp_size=2, options=EP2),
    Layout(tp_size=2, dp_size=2, options=SEQUENCE_PARALLEL + EP2 + ETP2),
    Layout(tp_size=2, pp_size=2, options=SEQUENCE_PARALLEL + EP2 + RECOMPUTE + DISTRIBUTED),
    Layout(dp_size=4, options=(("ep_size", 4),)),
]

# Each mechanism once, with embeddings tied and not, biases, qk norm. The vocabulary of 250 is padded in all.
ONCE = [
    ("llama", ALONE),
    ("llama", TP2),
    ("qwen2", PP2),
    ("qwen3", DP2),
    ("qwen3", DP2_DISTRIBUTED),
    ("qwen3", TP2_PP2),
    ("qwen3_moe", Layout(dp_size=2, options=EP2)),
    ("qwen2", CP2),
    ("qwen3", VPP2),
    ("llama", replace(TP2_CP2, options=SEQUENCE_PARALLEL)),
    ("qwen3", Layout(backend="fsdp")),
    ("qwen3", Layout(backend="fsdp", dp_size=2)),
]
# Each layout under each algorithm, and by families of models under one.
LAYOUTS = [
    *(Layout(backend="fsdp", dp_size=size) for size in (1, 2, 4)),
    *(Layout(backend="fsdp", dp_size=2, sequences=n) for n in (1, len(LENGTHS))),
    Layout(backend="fsdp", dp_size=2, options=RECOMPUTE),
    *(ALONE, TP2, PP2, VPP2, DP2, CP2, TP2_PP2),
    *(replace(layout, options=SEQUENCE_PARALLEL) for layout in (TP2, TP2_PP2, TP2_CP2)),
    *(replace(layout, options=DISTRIBUTED) for layout in (DP2, CP2, VPP2, TP2_DP2)),
    *(replace(layout, options=RECOMPUTE) for layout in (TP2, PP2, VPP2, CP2)),
    *(replace(layout, sequences=n) for layout in (ALONE, TP2, CP2) for n in (1, len(LENGTHS))),
    *(replace(layout, sequences=1) for layout in (PP2, VPP2)),
    *(
        TP2_CP2,
        TP2_DP2,
        PP2_DP2,
        Layout(pp_size=4),
        Layout(cp_size=4),
        Layout(dp_size=4, options=DISTRIBUTED),
    ),
    Layout(cp_size=2, pp_size=2, vpp_size=2, sequences=2, options=DISTRIBUTED),
    Layout(cp_size=2, dp_size=2, options=DISTRIBUTED),
    Layout(tp_size=2, pp_size=2, vpp_size=2, sequences=2, options=SEQUENCE_PARALLEL + RECOMPUTE),
]
MATRIX = [
    *(
        ("qwen3", replace(layout, algorithm=name))
        for name in parity.ALGORITHMS
        for layout in LAYOUTS
    ),
    *(
        (f, layout)
        for f in ("llama", "qwen2", "qwen3_untied")
        for layout in (ALONE, TP2, PP2, VPP2, CP2, TP2_PP2)
    ),
    *(
        (f, layout)
        for f in ("llama", "qwen2")
        for layout in (DP2, DP2_DISTRIBUTED, TP2_DP2_DISTRIBUTED, PP2_DP2)
    ),
    *(("llama3", layout) for layout in (ALONE, CP2)),
    *((family, layout) for family in ("qwen3_moe", "glm4_moe") for layout in EXPERTS),
    ("deepseek_v3", Layout(tp_size=2, options=SEQUENCE_PARALLEL + EP2)),
    ("qwen2_moe", Layout(tp_size=2, options=SEQUENCE_PARALLEL + EP2)),
    ("qwen3_moe_mixed", Layout(pp_size=4)),  # two stages have no experts
    *(
        (family, layout)
        for family in ("qwen3_moe", "glm4_moe", "deepseek_v3")
        for layout in (CP2, VPP2)
    ),
    (IDLE, Layout(dp_size=2, options=EP2)),
]
RESHARDED: list[tuple[str, Layout, Any]] = [  # into one rank, or from one
    ("qwen3", TP2_PP2_DISTRIBUTED, reshard),
    ("qwen3", TP2_DP2_DISTRIBUTED, reshard),
    ("qwen3", CP2, reshard),
    ("qwen3", replace(VPP2, options=DISTRIBUTED), reshard),
    ("qwen3", replace(VPP2, options=DISTRIBUTED), grow),
    ("qwen3", replace(TP2_CP2, options=DISTRIBUTED), reshard),
    ("qwen3_moe", EP2_DISTRIBUTED, reshard),
    ("qwen3_moe", EP2_DISTRIBUTED, grow),
    ("qwen3_moe", Layout(dp_size=2, options=EP2), reshard),
    ("qwen3_moe", Layout(tp_size=2, options=SEQUENCE_PARALLEL + EP2), grow),
    ("qwen3_moe_mixed", Layout(pp_size=4, options=DISTRIBUTED), reshard),
    ("qwen3_moe_mixed", Layout(pp_size=4), grow),
]


def unwanted(tensors: dict[str, torch.Tensor]) -> None:
    """The second half of the experts is never chosen."""
    for name, bias in tensors.items():
        if name.endswith("e_score_correction_bias"):
            bias[len(bias) // 2 :] = -9.0


@dataclass
class Problem:
    model_dir: Path
    steps: list[dict[str, Any]]
    reference: Outcome

    @classmethod
    def make(cls, family: str, algorithm: str, directory: Path) -> Problem:
        kind = family.removesuffix("_idle")
        model_dir = save_model(directory / f"{family}-{algorithm}", kind, **changes(kind))
        if family == IDLE:
            rewrite(model_dir / "model.safetensors", unwanted)
        steps = [make_step(model_dir, number) for number in range(NUM_STEPS)]
        return cls(model_dir, steps, reference(model_dir, steps, algorithm))


def run_all(cases: list[tuple[str, Layout]], tmp: Path, more: list[Any], deadline_s: float) -> Any:
    """The problem and the outcome of each case, and what the functions of `more` returned by rank."""
    jobs = [(*case, train) for case in cases] + more
    made = {
        key: Problem.make(*key, tmp)
        for key in sorted({(f, layout.algorithm) for f, layout, _ in jobs})
    }
    problems = [made[family, layout.algorithm] for family, layout, _ in jobs]
    results = parity.run(
        [(job[1], p.model_dir, job[2], p.steps) for job, p in zip(jobs, problems, strict=True)],
        tmp,
        deadline_s,
    )
    outcomes = {case: collect(r, case[1]) for case, r in zip(cases, results, strict=False)}
    return dict(zip(cases, problems, strict=False)), outcomes, results[len(cases) :]


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    resumes = [("qwen3", layout, interrupted) for layout in (TP2_PP2, DP2_DISTRIBUTED, VPP2)]
    others = [("qwen3", layout, reshard) for layout in (VPP2, CP2_DISTRIBUTED)]
    return run_all(ONCE, tmp_path_factory.mktemp("parity"), resumes + others, deadline_s=240)


@pytest.mark.parametrize("case", ONCE, ids=lambda case: f"{case[0]}-{case[1]}")
def test_training_equals_plain_pytorch(once, case):
    problems, outcomes, _ = once
    assert_parity(outcomes[case], problems[case].reference, case[1])


@pytest.mark.parametrize("case", ONCE, ids=lambda case: f"{case[0]}-{case[1]}")
def test_weight_shards_are_the_checkpoint_bit_for_bit(once, case):
    problems, outcomes, _ = once
    saved = load_file(problems[case].model_dir / "model.safetensors")
    initial = outcomes[case].extra["initial"]
    assert (
        initial.keys() == saved.keys() == {tensor.name for tensor in outcomes[case].extra["plan"]}
    )
    assert all(torch.equal(initial[name], saved[name]) for name in saved)


@pytest.mark.parametrize("case", ONCE, ids=lambda case: f"{case[0]}-{case[1]}")
def test_reference_logprobs_are_those_of_the_initial_weights_and_leave_the_policy_alone(once, case):
    _, outcomes, _ = once
    outcome = outcomes[case]
    for reference_, initial in zip(outcome.extra["ref_logprobs"], outcome.logprobs, strict=True):
        assert torch.equal(reference_, initial)
    after = outcome.extra["params_after_ref"]
    assert all(torch.equal(after[name], value) for name, value in outcome.params.items())


@pytest.mark.parametrize("index", range(3), ids=["tp2-pp2", "dp2-distributed", "vpp2"])
def test_a_resumed_run_continues_bit_for_bit(once, index):
    check_resumed(once[2][index])


def check_resumed(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["resumed"]["step"] == rank["uninterrupted"]["step"]
        assert rank["loaded_is_saved"]
        for name, value in rank["uninterrupted"]["state"].items():
            assert torch.equal(rank["resumed"]["state"][name], value), name
        assert rank["children_after_save"] == []


@pytest.mark.parametrize("index", [3, 4], ids=["vpp2", "cp2-distributed"])
def test_a_checkpoint_of_either_mechanism_loads_into_one_rank(once, index):
    assert max(rank["difference"] for rank in once[2][index]) <= parity.ABSOLUTE


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    both = Layout(tp_size=2, dp_size=2, options=SEQUENCE_PARALLEL + EP2 + ETP2)
    more = [*RESHARDED, ("qwen3_moe", both, sent), ("qwen3_moe", EP2_DISTRIBUTED, interrupted)]
    return run_all(MATRIX, tmp_path_factory.mktemp("matrix"), more, deadline_s=3000)


@pytest.mark.matrix
@pytest.mark.timeout(3100)
@pytest.mark.parametrize("case", MATRIX, ids=lambda case: f"{case[0]}-{case[1]}")
def test_matrix_equals_plain_pytorch(matrix, case, record_property):
    problems, outcomes, _ = matrix
    differences = parity.compare(outcomes[case], problems[case].reference)
    record_property("parity", (str(replace(case[1], algorithm="grpo")), differences))
    assert_parity(outcomes[case], problems[case].reference, case[1])


@pytest.mark.matrix
@pytest.mark.timeout(3100)
@pytest.mark.parametrize(
    "index", range(len(RESHARDED)), ids=lambda i: "-".join(map(str, RESHARDED[i][:2]))
)
def test_a_checkpoint_loads_into_another_layout(matrix, index):
    for rank in matrix[2][index]:
        assert rank["difference"] <= parity.ABSOLUTE, rank["difference"]


@pytest.mark.matrix
@pytest.mark.timeout(3100)
def test_a_resumed_run_with_experts_continues_bit_for_bit(matrix):
    check_resumed(matrix[2][-1])


@pytest.mark.matrix
@pytest.mark.timeout(3100)
def test_a_weight_sync_assembles_experts_bit_for_bit(matrix):
    problems, _, more = matrix
    saved, [found, *others] = (
        load_file(problems["qwen3_moe", DP2].model_dir / "model.safetensors"),
        more[-2],
    )
    assert found.keys() == saved.keys() and not any(others)
    assert all(torch.equal(found[name], saved[name]) for name in saved)
