"""What a backend cannot train is refused before submission, with the value, its place
and a way out."""

from dataclasses import replace

import pytest

from nanoslime.models.shape import ModelShape
from nanoslime.models.trainable import check_kernels
from nanoslime.types import RunError
from tests.models.published import CONFIGS
from tests.plans import H200, QWEN3_4B, QWEN3_30B_A3B, config_of, plan_of
from tools.memory.plan import plan


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("Mistral-7B-v0.1", {}, "cannot train this mistral: sliding_window=4096"),
        (
            "Qwen3-4B",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "cannot train this qwen3: rope scaling .*yarn",
        ),
        ("GLM-4-9B-0414", {}, "cannot train this glm4: norms after attention and MLP"),
        ("DeepSeek-V3", {}, "cannot train this deepseek_v3: rope scaling .*yarn"),
        (
            "DeepSeek-V3",
            {"num_experts_per_tok": 4},
            "cannot train this deepseek_v3: .*, groups of experts",
        ),
    ],
)
def test_what_the_megatron_backend_cannot_compute_is_refused_by_name(name, changes, says):
    shape = ModelShape.from_config(CONFIGS[name] | changes)
    with pytest.raises(RunError, match=f"training.backend=megatron {says}"):
        plan_of("--nodes 4 --backend megatron", shape)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            "--cp-size 3",
            "training.cp_size=3 does not divide the 16 trainer .*; choose 1, 2, 4, 8 or 16",
        ),
        (
            "--tp-size 8 --cp-size 2 --pp-size 3",
            "tp_size=8 x training.cp_size=2 x training.pp_size=3 = 48 does not divide "
            "the 16 .* 8 x 1,",
        ),
        ("--vpp-size 2", "training.vpp_size=2 needs training.pp_size of 2 or more; choose 1"),
        (
            "--pp-size 16 --vpp-size 3",
            "training.pp_size=16 x training.vpp_size=3 is more than num_layers=36; "
            "choose sizes whose product is at most 36",
        ),
        (
            "--pp-size 2 --vpp-size 40",
            "training.vpp_size=40 is more than num_layers=36; choose sizes whose product is at "
            "most 36",
        ),
        (
            "--decoder-first-pipeline-num-layers 3",
            "training.num_layers_in_first_pipeline_stage=3 needs training.pp_size of 2 or more",
        ),
        (
            "--decoder-last-pipeline-num-layers 36",
            "training.num_layers_in_last_pipeline_stage=36 needs training.pp_size of 2 or more",
        ),
        (
            "--pp-size 2 --decoder-first-pipeline-num-layers 17 "
            "--decoder-last-pipeline-num-layers 17",
            "first_pipeline_stage=17 and training.num_layers_in_last_pipeline_stage=17: 36 layers "
            "on 2 ranks .* would be .17, 17.; leave both out, which gives the first 18 and the "
            "last 18",
        ),
        (
            "--pp-size 4 --decoder-first-pipeline-num-layers 34",
            "first_pipeline_stage=34: 36 layers on 4 ranks .* would be .34, 1, 1, 0.",
        ),
        (
            "--pp-size 4 --vpp-size 2 --decoder-last-pipeline-num-layers 1",
            "last_pipeline_stage=1: 36 .* with training.vpp_size=2 chunks .* the last 9",
        ),
        (
            "--pp-size 2 --decoder-first-pipeline-num-layers 40",
            "first_pipeline_stage=40: 36 layers on 2 ranks .* would be .40, -4.",
        ),
        (
            "--tp-size 3",
            "training.tp_size=3 does not divide num_attention_heads=32; choose 1, 2, 4 or 8",
        ),
        (
            "--tp-size 16",
            "tp_size=16 does not divide num_key_value_heads=8; choose 1, 2, 4 or 8",
        ),
        ("--backend fsdp --cp-size 2", "training.cp_size=2 needs --backend megatron"),
        ("--backend fsdp --vpp-size 2", "training.vpp_size=2 needs --backend megatron"),
        ("--backend fsdp --pp-size 2", "training.pp_size=2 needs --backend megatron"),
        (
            "--backend fsdp --tp-size 2",
            "training.tp_size=2 needs --backend megatron; with fsdp set 1",
        ),
        ("--ep-size 2", "training.ep_size=2 spreads experts, and a qwen3 has none; choose 1"),
        ("--etp-size 2", "training.etp_size=2 cuts experts, and a qwen3 has none; choose 1"),
    ],
)
def test_sizes_that_do_not_fit_the_model_are_refused_with_the_way_out(flags, says):
    with pytest.raises(RunError, match=says):
        plan_of(f"--nodes 4 {H200} {flags}", QWEN3_4B)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            "--nodes 4 --tp-size 8 --cluster.slots-per-node 4",
            "must lie in one node, .* its 4 slots; choose 1, 2 or 4",
        ),
        (
            "--nodes 2 --tp-size 2 --pp-size 2 --cluster.slots-per-node 2",
            "pp_size=2 = 4 does not divide the 2 trainer ranks; "
            "choose TP x PP 1 x 1, 1 x 2 or 2 x 1, or change cluster.nodes",
        ),
    ],
)
def test_sizes_that_do_not_fit_the_nodes_are_refused_with_the_way_out(flags, says):
    with pytest.raises(RunError, match=says):
        plan_of(flags, QWEN3_4B)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            "--backend fsdp",
            "training.backend=fsdp .*qwen3_moe, which has experts; use --backend megatron",
        ),
        ("--tp-size 2", "training.tp_size=2 of a model with experts needs --sequence-parallel"),
        (
            "--ep-size 3",
            "training.ep_size=3 must divide num_experts=128, .* the 16 ranks "
            ".* choose 1, 2, 4, 8 or 16",
        ),
        (
            "--ep-size 16 --pp-size 2",
            "ep_size=16 must divide .* the 8 ranks of a .* choose 1, 2, 4 or 8",
        ),
        (
            "--etp-size 5",
            "training.etp_size=5 must divide moe_intermediate_size=768, .* choose 1, 2, 4, 8 or 16",
        ),
        (
            "--ep-size 8 --etp-size 4",
            "etp_size=4 must divide .* training.etp_size the 16 .* choose 1 or 2",
        ),
    ],
)
def test_experts_that_do_not_fit_are_refused_with_the_way_out(flags, says):
    with pytest.raises(RunError, match=says):
        plan_of(f"--nodes 4 {H200} {flags}", QWEN3_30B_A3B)


def test_experts_may_be_spread_over_all_ranks_of_a_pipeline_stage():
    sizes = "--tp-size 4 --sequence-parallel --pp-size 2 --ep-size 4 --etp-size 2"
    layout = plan_of(f"--nodes 4 {H200} {sizes} --allow-slow", QWEN3_30B_A3B)
    assert (layout.parallel.ep, layout.parallel.dp) == (4, 2)


def test_a_pattern_of_frozen_tensors_that_matches_none_is_refused_before_submission():
    config = config_of(f"--nodes 4 {H200} --tp-size 2")
    training = replace(config.training, freeze=["embed_token", "gate_porj"])
    says = "'gate_porj' is found in no tensor of the model.*mlp.gate_proj"
    with pytest.raises(RunError, match=says):
        plan(replace(config, training=training), QWEN3_4B)


def test_what_is_slow_without_transformer_engine_needs_to_be_allowed_on_gpus(tmp_path):
    flags = f"--nodes 4 {H200} --cp-size 2 --cluster.venv {tmp_path}"
    with pytest.raises(RunError, match="cp_size=2: without Transformer Engine .* by --allow-slow"):
        plan_of(flags, QWEN3_4B)
    assert plan_of(f"{flags} --allow-slow", QWEN3_4B).parallel.cp == 2
    without_gpus = "--nodes 4 --cp-size 2"
    assert plan_of(without_gpus).parallel.cp == 2
    # The nodes will say whether their environment has it.
    assert plan_of(f"{flags}/elsewhere", QWEN3_4B).parallel.cp == 2
    (tmp_path / "lib/python3.12/site-packages/transformer_engine").mkdir(parents=True)
    assert plan_of(flags, QWEN3_4B).parallel.cp == 2


def test_experts_without_transformer_engine_need_to_be_allowed():
    training = config_of("--backend megatron").training
    says = "qwen3_moe: without Transformer Engine experts .* by --allow-slow"
    with pytest.raises(RunError, match=says):
        check_kernels(training, QWEN3_30B_A3B, transformer_engine=False)
    allowed = replace(training, allow_slow=True)
    check_kernels(allowed, QWEN3_30B_A3B, transformer_engine=False)
    check_kernels(training, QWEN3_30B_A3B, transformer_engine=True)
    check_kernels(training, QWEN3_4B, transformer_engine=False)
