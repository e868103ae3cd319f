"""Every backend in every layout trains as plain PyTorch in one process does."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
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
from tests.training.parity import (
    LENGTHS,
    NUM_STEPS,
    Job,
    Layout,
    Outcome,
    RankFunction,
    assert_parity,
    collect,
    train,
)
from tests.training.reference import make_step, reference

pytestmark = pytest.mark.megatron

DISTRIBUTED = (("distributed_optimizer", True),)
SEQUENCE_PARALLEL = (("sequence_parallel", True),)
RECOMPUTE = (("recompute", True),)
EP2 = (("ep_size", 2),)
EP4 = (("ep_size", 4),)
ETP2 = (("etp_size", 2),)
FIRST_1 = (("num_layers_in_first_pipeline_stage", 1),)
FIRST_2 = (("num_layers_in_first_pipeline_stage", 2),)
LAST_1 = (("num_layers_in_last_pipeline_stage", 1),)

OVERLAP_GRADS = (("overlap_grad_reduce", True), ("bucket_size", 1000))

ALONE = Layout()
TP2 = Layout(tp_size=2)
PP2 = Layout(pp_size=2)
DP2 = Layout(dp_size=2)
CP2 = Layout(cp_size=2)
VPP2 = Layout(pp_size=2, vpp_size=2, sequences=2)
TP2_PP2 = Layout(tp_size=2, pp_size=2)
TP2_DP2 = Layout(tp_size=2, dp_size=2)
TP2_CP2 = Layout(tp_size=2, cp_size=2)
PP2_DP2 = Layout(pp_size=2, dp_size=2)
DP2_EP2 = Layout(dp_size=2, options=EP2)
DP2_DISTRIBUTED = replace(DP2, options=DISTRIBUTED)
CP2_DISTRIBUTED = replace(CP2, options=DISTRIBUTED)
VPP2_DISTRIBUTED = replace(VPP2, options=DISTRIBUTED)
TP2_PP2_DISTRIBUTED = replace(TP2_PP2, options=DISTRIBUTED)
TP2_DP2_DISTRIBUTED = replace(TP2_DP2, options=DISTRIBUTED)
TP2_CP2_DISTRIBUTED = replace(TP2_CP2, options=DISTRIBUTED)
EP2_DISTRIBUTED = Layout(dp_size=2, options=EP2 + DISTRIBUTED)
TP2_EP2 = Layout(tp_size=2, options=SEQUENCE_PARALLEL + EP2)
TP2_DP2_EP2_ETP2 = replace(TP2_DP2, options=SEQUENCE_PARALLEL + EP2 + ETP2)
FSDP1 = Layout(backend="fsdp")
FSDP2 = Layout(backend="fsdp", dp_size=2)
FSDP4 = Layout(backend="fsdp", dp_size=4)

IDLE = "glm4_moe_idle"  # half of the experts, all on one rank, get no token at all

EXPERTS = [
    DP2,
    replace(TP2, options=SEQUENCE_PARALLEL),
    TP2_EP2,
    replace(TP2, options=SEQUENCE_PARALLEL + ETP2),
    DP2_EP2,
    Layout(dp_size=2, options=ETP2),
    EP2_DISTRIBUTED,
    replace(PP2_DP2, options=EP2),
    TP2_DP2_EP2_ETP2,
    replace(TP2_PP2, options=SEQUENCE_PARALLEL + EP2 + RECOMPUTE + DISTRIBUTED),
    Layout(dp_size=4, options=EP4),
]

Case = tuple[str, Layout]  # the model's family, the layout

# Each mechanism once, with embeddings tied and not, biases, qk norm. The vocabulary of
# 250 is padded in all.
ONCE: list[Case] = [
    ("llama", ALONE),
    ("llama", TP2),
    ("qwen2", PP2),
    ("qwen3", DP2),
    ("qwen3", DP2_DISTRIBUTED),
    ("qwen3", replace(DP2, ddp=OVERLAP_GRADS)),
    ("qwen3", replace(DP2_DISTRIBUTED, ddp=OVERLAP_GRADS)),
    ("qwen3", TP2_PP2),
    ("qwen3_moe", DP2_EP2),
    ("qwen2", CP2),
    ("qwen3", VPP2),
    ("qwen3", replace(PP2, options=FIRST_1)),
    ("qwen3_layers5", VPP2),
    ("llama", replace(TP2_CP2, options=SEQUENCE_PARALLEL)),
    ("qwen3", FSDP1),
    ("qwen3", FSDP2),
]

# Each layout is run under each algorithm.
LAYOUTS = [
    FSDP1,
    FSDP2,
    FSDP4,
    replace(FSDP2, sequences=1),
    replace(FSDP2, sequences=len(LENGTHS)),
    replace(FSDP2, options=RECOMPUTE),
    ALONE,
    TP2,
    PP2,
    VPP2,
    DP2,
    CP2,
    TP2_PP2,
    replace(TP2, options=SEQUENCE_PARALLEL),
    replace(TP2_PP2, options=SEQUENCE_PARALLEL),
    replace(TP2_CP2, options=SEQUENCE_PARALLEL),
    DP2_DISTRIBUTED,
    CP2_DISTRIBUTED,
    VPP2_DISTRIBUTED,
    TP2_DP2_DISTRIBUTED,
    replace(TP2, options=RECOMPUTE),
    replace(PP2, options=RECOMPUTE),
    replace(VPP2, options=RECOMPUTE),
    replace(CP2, options=RECOMPUTE),
    replace(ALONE, sequences=1),
    replace(ALONE, sequences=len(LENGTHS)),
    replace(TP2, sequences=1),
    replace(TP2, sequences=len(LENGTHS)),
    replace(CP2, sequences=1),
    replace(CP2, sequences=len(LENGTHS)),
    replace(PP2, sequences=1),
    replace(VPP2, sequences=1),
    TP2_CP2,
    TP2_DP2,
    PP2_DP2,
    Layout(pp_size=4),
    Layout(cp_size=4),
    Layout(dp_size=4, options=DISTRIBUTED),
    Layout(cp_size=2, pp_size=2, vpp_size=2, sequences=2, options=DISTRIBUTED),
    Layout(cp_size=2, dp_size=2, options=DISTRIBUTED),
    Layout(tp_size=2, pp_size=2, vpp_size=2, sequences=2, options=SEQUENCE_PARALLEL + RECOMPUTE),
]


def _matrix() -> list[Case]:
    cases: list[Case] = []
    for algorithm in parity.ALGORITHMS:
        cases += [("qwen3", replace(layout, algorithm=algorithm)) for layout in LAYOUTS]
    for family in ("llama", "qwen2", "qwen3_untied"):
        cases += [(family, layout) for layout in (ALONE, TP2, PP2, VPP2, CP2, TP2_PP2)]
    for family in ("llama", "qwen2"):
        layouts = (DP2, DP2_DISTRIBUTED, TP2_DP2_DISTRIBUTED, PP2_DP2)
        cases += [(family, layout) for layout in layouts]
    cases += [("llama3", layout) for layout in (ALONE, CP2)]
    for family in ("qwen3_moe", "glm4_moe"):
        cases += [(family, layout) for layout in EXPERTS]
    cases += [("deepseek_v3", TP2_EP2), ("qwen2_moe", TP2_EP2)]
    cases.append(("qwen3_moe_mixed", Layout(pp_size=4)))  # two stages have no experts
    for family in ("qwen3_moe", "glm4_moe", "deepseek_v3"):
        cases += [(family, layout) for layout in (CP2, VPP2)]
    cases.append((IDLE, DP2_EP2))
    cases.append((IDLE, replace(DP2_EP2, ddp=OVERLAP_GRADS)))
    for layout in (PP2_DP2, replace(VPP2, dp_size=2)):
        cases.append(("qwen3", replace(layout, ddp=OVERLAP_GRADS)))
        overlapped = replace(layout, options=RECOMPUTE + DISTRIBUTED, ddp=OVERLAP_GRADS)
        cases.append(("qwen3_moe", overlapped))
    for family in ("qwen3", "qwen3_untied", "qwen3_moe", "glm4_moe", "deepseek_v3"):
        cases.append((family, replace(PP2, options=FIRST_1)))
        cases.append((family, replace(PP2, options=LAST_1 + RECOMPUTE)))
    for family in ("qwen3_layers5", "llama_layers5", "glm4_moe_layers5", "deepseek_v3_layers5"):
        cases += [(family, VPP2), (family, Layout(pp_size=4))]
    cases.append(("qwen3_layers7", replace(VPP2, options=FIRST_2 + DISTRIBUTED)))
    return cases


MATRIX = _matrix()

# A checkpoint is loaded into one rank (reshard), or from one (grow).
RESHARDED: list[tuple[str, Layout, RankFunction]] = [
    ("qwen3", TP2_PP2_DISTRIBUTED, reshard),
    ("qwen3", TP2_DP2_DISTRIBUTED, reshard),
    ("qwen3", CP2, reshard),
    ("qwen3", VPP2_DISTRIBUTED, reshard),
    ("qwen3", VPP2_DISTRIBUTED, grow),
    ("qwen3", TP2_CP2_DISTRIBUTED, reshard),
    ("qwen3_moe", EP2_DISTRIBUTED, reshard),
    ("qwen3_moe", EP2_DISTRIBUTED, grow),
    ("qwen3_moe", DP2_EP2, reshard),
    ("qwen3_moe", TP2_EP2, grow),
    ("qwen3_moe_mixed", Layout(pp_size=4, options=DISTRIBUTED), reshard),
    ("qwen3_moe_mixed", Layout(pp_size=4), grow),
    ("qwen3", replace(PP2, options=FIRST_1 + DISTRIBUTED), reshard),
    ("qwen3_layers5", VPP2_DISTRIBUTED, grow),
    ("glm4_moe_layers5", Layout(pp_size=4), reshard),
]


def unwanted(tensors: dict[str, torch.Tensor]) -> None:
    """Biases the scores so that the second half of the experts is never chosen."""
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
        kind, _, num_layers = family.removesuffix("_idle").partition("_layers")
        sizes = changes(kind)
        if num_layers:
            sizes["num_hidden_layers"] = int(num_layers)
        model_dir = save_model(directory / f"{family}-{algorithm}", kind, **sizes)
        if family == IDLE:
            rewrite(model_dir / "model.safetensors", unwanted)
        steps = [make_step(model_dir, number) for number in range(NUM_STEPS)]
        return cls(model_dir, steps, reference(model_dir, steps, algorithm))


@dataclass
class Runs:
    """Results of one set of rank processes."""

    problems: dict[Case, Problem]
    trained: dict[Case, list[dict[str, Any]]]  # what `train` returned, by rank
    others: list[list[dict[str, Any]]]  # what the further functions returned, by rank
    _outcomes: dict[Case, Outcome] = field(default_factory=dict)

    def outcome(self, case: Case) -> Outcome:
        """Collected where a test asks for it, so that ranks which disagree fail that test."""
        if case not in self._outcomes:
            _, layout = case
            self._outcomes[case] = collect(self.trained[case], layout)
        return self._outcomes[case]


def run_all(
    cases: list[Case],
    tmp: Path,
    others: list[tuple[str, Layout, RankFunction]],
    deadline_s: float,
) -> Runs:
    """Trains in each case, and runs the functions of `others`."""
    functions = [(*case, train) for case in cases] + others
    made: dict[tuple[str, str], Problem] = {}
    jobs = []
    for family, layout, function in functions:
        key = (family, layout.algorithm)
        if key not in made:
            made[key] = Problem.make(*key, tmp)
        problem = made[key]
        jobs.append(Job(layout, problem.model_dir, function, problem.steps))
    results = parity.run(jobs, tmp, deadline_s)
    problems = {}
    for case in cases:
        family, layout = case
        problems[case] = made[family, layout.algorithm]
    trained = dict(zip(cases, results[: len(cases)], strict=True))
    return Runs(problems, trained, results[len(cases) :])


def label(case: tuple[Any, ...]) -> str:
    family, layout, *_ = case
    return f"{family}-{layout}"


@pytest.fixture(scope="module")
def once(tmp_path_factory) -> Runs:
    others = [("qwen3", layout, interrupted) for layout in (TP2_PP2, DP2_DISTRIBUTED, VPP2)]
    others += [("qwen3", layout, reshard) for layout in (VPP2, CP2_DISTRIBUTED)]
    return run_all(ONCE, tmp_path_factory.mktemp("parity"), others, deadline_s=240)


@pytest.mark.parametrize("case", ONCE, ids=label)
def test_training_equals_plain_pytorch(once, case):
    _, layout = case
    assert_parity(once.outcome(case), once.problems[case].reference, layout)


@pytest.mark.parametrize("case", ONCE, ids=label)
def test_weight_shards_are_the_checkpoint_bit_for_bit(once, case):
    saved = load_file(once.problems[case].model_dir / "model.safetensors")
    extra = once.outcome(case).extra
    assert extra["initial"].keys() == saved.keys()
    assert {tensor.name for bucket in extra["plan"] for tensor in bucket.tensors} == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(extra["initial"][name], tensor), name


@pytest.mark.parametrize("case", ONCE, ids=label)
def test_reference_logprobs_are_those_of_the_initial_weights_and_leave_the_policy_alone(once, case):
    outcome = once.outcome(case)
    for ref_logprobs, initial in zip(outcome.extra["ref_logprobs"], outcome.logprobs, strict=True):
        assert torch.equal(ref_logprobs, initial)
    for name, value in outcome.params.items():
        assert torch.equal(outcome.extra["params_after_ref"][name], value), name


@pytest.mark.parametrize("index", range(3), ids=["tp2-pp2", "dp2-distributed", "vpp2"])
def test_a_resumed_run_continues_bit_for_bit(once, index):
    check_resumed(once.others[index])


def check_resumed(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["resumed"]["step"] == rank["uninterrupted"]["step"]
        assert rank["loaded_is_saved"]
        for name, value in rank["uninterrupted"]["state"].items():
            assert torch.equal(rank["resumed"]["state"][name], value), name
        assert rank["children_after_save"] == []


@pytest.mark.parametrize("index", [3, 4], ids=["vpp2", "cp2-distributed"])
def test_a_checkpoint_of_either_mechanism_loads_into_one_rank(once, index):
    for rank in once.others[index]:
        assert rank["difference"] <= parity.ABSOLUTE


@pytest.fixture(scope="module")
def matrix(tmp_path_factory) -> Runs:
    others = [
        *RESHARDED,
        ("qwen3_moe", TP2_DP2_EP2_ETP2, sent),
        ("qwen3_moe", EP2_DISTRIBUTED, interrupted),
    ]
    return run_all(MATRIX, tmp_path_factory.mktemp("matrix"), others, deadline_s=3000)


@pytest.mark.matrix
@pytest.mark.timeout(3100)
@pytest.mark.parametrize("case", MATRIX, ids=label)
def test_matrix_equals_plain_pytorch(matrix, case, record_property):
    _, layout = case
    expected = matrix.problems[case].reference
    differences = parity.compare(matrix.outcome(case), expected)
    record_property("parity", (str(layout), differences))
    assert_parity(matrix.outcome(case), expected, layout)


@pytest.mark.matrix
@pytest.mark.timeout(3100)
@pytest.mark.parametrize("index", range(len(RESHARDED)), ids=lambda index: label(RESHARDED[index]))
def test_a_checkpoint_loads_into_another_layout(matrix, index):
    for rank in matrix.others[index]:
        assert rank["difference"] <= parity.ABSOLUTE


@pytest.mark.matrix
@pytest.mark.timeout(3100)
def test_a_resumed_run_with_experts_continues_bit_for_bit(matrix):
    check_resumed(matrix.others[-1])


@pytest.mark.matrix
@pytest.mark.timeout(3100)
def test_a_weight_sync_assembles_experts_bit_for_bit(matrix):
    saved = load_file(matrix.problems["qwen3_moe", DP2].model_dir / "model.safetensors")
    on_rank_0, *on_others = matrix.others[-2]
    assert on_rank_0.keys() == saved.keys()
    assert not any(on_others)
    for name, tensor in saved.items():
        assert torch.equal(on_rank_0[name], tensor), name
