"""What a plan must hold in memory, worked out by hand; and what fits on no GPU."""

import re
from dataclasses import replace

import pytest

from nanoslime.config import ModelConfig, RunConfig, TrainingConfig
from nanoslime.layout import describe, plan
from nanoslime.memory import (
    Memory,
    Sharding,
    estimate_memory,
    rank_parameters,
    training_bytes,
)
from nanoslime.models.parallel_sizes import ParallelDims, PipelineSizes
from nanoslime.models.shape import ModelShape
from nanoslime.models.tiny import tiny_qwen3_config
from nanoslime.types import RunError
from tests.models.hf import make_model
from tests.models.published import CONFIGS
from tests.plans import H200, QWEN3_4B, TINY, config_of, plan_of
from tools.gpu_checks import QWEN3_06B


def need_of(flags: str, shape: ModelShape) -> Memory:
    config = config_of(flags)
    return estimate_memory(config, shape, plan(config, shape).parallel)


def test_the_fullest_rank_is_an_end_of_the_pipeline(tmp_path):
    make_model("qwen3_untied").config.save_pretrained(tmp_path)
    shape = ModelShape.read(tmp_path)
    whole = sum(rank_parameters(shape, Sharding()))
    assert whole == pytest.approx(shape.num_parameters, abs=shape.hidden_size)
    end_of_pipeline = 2 * shape.num_layer_parameters + shape.num_embedding_parameters
    quarter = Sharding(tp_size=2, pipeline=PipelineSizes(pp_size=2))
    assert sum(rank_parameters(shape, quarter)) == end_of_pipeline // 2
    alone = training_bytes(shape, quarter)
    assert alone == 18 * sum(rank_parameters(shape, quarter))
    assert training_bytes(shape, replace(quarter, dp_size=4)) == alone // 2
    undivided = replace(quarter, dp_size=4, distributed_optimizer=False)
    assert training_bytes(shape, undivided) == alone


def test_in_an_uneven_pipeline_the_fullest_rank_counts():
    shape = replace(QWEN3_4B, num_layers=6, tie_word_embeddings=False)
    layer = shape.num_layer_parameters
    embedding = shape.num_embedding_parameters
    equal = Sharding(pipeline=PipelineSizes(pp_size=3))
    assert rank_parameters(shape, equal) == (2 * layer + embedding, 0)
    middle = Sharding(pipeline=PipelineSizes(pp_size=3, first=1, last=1))
    assert rank_parameters(shape, middle) == (max(4 * layer, layer + embedding), 0)
    last = Sharding(pipeline=PipelineSizes(pp_size=3, first=1, last=4))
    assert rank_parameters(shape, last) == (4 * layer + embedding, 0)
    # The second rank has chunks of 2 and 2 layers.
    interleaved = Sharding(pipeline=PipelineSizes(pp_size=2, vpp_size=2, first=2))
    assert rank_parameters(shape, interleaved) == (4 * layer + embedding, 0)


def test_dense_layers_before_the_experts_are_not_counted_as_experts():
    shape = ModelShape.from_config(CONFIGS["DeepSeek-V3"])
    experts_of_layer = 256 * 3 * 7168 * 2048
    first = Sharding(pipeline=PipelineSizes(pp_size=2, first=60))
    assert rank_parameters(shape, first)[1] == 57 * experts_of_layer
    for sizes, layers in ((PipelineSizes(pp_size=4), 16), (PipelineSizes(pp_size=8), 8)):
        assert rank_parameters(shape, Sharding(pipeline=sizes))[1] == layers * experts_of_layer


def test_the_rank_with_most_layers_in_flight_keeps_the_activations():
    base = "--nodes 4 --cluster.slots-per-node 8 --pp-size 4"
    equal = need_of(base, QWEN3_4B).activations  # 9 layers of 4 micro-batches
    first = need_of(f"{base} --decoder-first-pipeline-num-layers 3", QWEN3_4B).activations
    assert first * 12 == equal * 11  # the second rank has 11 layers of 3 micro-batches
    last = need_of(f"{base} --decoder-last-pipeline-num-layers 33", QWEN3_4B).activations
    assert last * 36 == equal * 33  # the last rank has all of one micro-batch


def test_experts_are_divided_over_their_own_ranks(tmp_path):
    make_model("qwen3_moe").config.save_pretrained(tmp_path)
    shape = ModelShape.read(tmp_path)
    experts = 4 * 4 * 3 * 32 * 16  # layers, experts, matrices of an expert
    # Of the 8 ranks, 2 have the same experts.
    sharding = Sharding(tp_size=2, dp_size=4, expert_ways=4)
    dense_here, experts_here = rank_parameters(shape, sharding)
    assert experts_here == experts // 4
    assert dense_here == pytest.approx((shape.num_parameters - experts) / 2, abs=32)
    assert training_bytes(shape, sharding) == dense_here * 9 + experts_here * 12


def test_memory_of_a_model_worked_out_by_hand():
    config = config_of("--nodes 4 --tp-size 2 --pp-size 2")
    parallel = plan(config, TINY).parallel
    need = estimate_memory(config, TINY, parallel)
    layer = 64 * (2 * 64 + 2 * 32) + 2 * 64 + 2 * 16 + 3 * 64 * 128
    embedding = 320 * 64
    # One of two layers and one of two embeddings, cut in two.
    rank = (layer + embedding) // 2
    assert need.states == pytest.approx(rank * 18, rel=1e-3)
    # Keys and values, layers, groups, head_dim, bfloat16.
    assert need.kv_bytes_per_token == 2 * 2 * 2 * 16 * 2
    assert need.activations == 8192 * 2 * 1 * 2 * (4 * 64 + (2 * 64 + 2 * 32 + 3 * 128) // 2)

    with_reference = replace(config, algorithm=replace(config.algorithm, kl_coef=0.1))
    # The reference weights wait on the CPU.
    assert estimate_memory(with_reference, TINY, parallel).states == need.states

    offloaded = replace(config, training=replace(config.training, optimizer_offload=True))
    states = estimate_memory(offloaded, TINY, parallel).states
    assert states == pytest.approx(rank * 6, rel=1e-3)

    freeze = ["embed_tokens", "lm_head"]
    frozen = replace(config, training=replace(config.training, freeze=freeze))
    trained = layer / (layer + embedding)
    states = estimate_memory(frozen, TINY, parallel).states
    assert states == pytest.approx(rank * (2 + 16 * trained), rel=1e-3)


def test_context_parallel_ranks_share_the_optimizer_state_and_interleaving_keeps_more_activations():
    base = "--nodes 4 --cluster.slots-per-node 8 --tp-size 2 --pp-size 2"
    plain = need_of(base, QWEN3_4B)
    with_cp = need_of(f"{base} --cp-size 2", QWEN3_4B)
    assert (plain.states, plain.activations) == (with_cp.states, with_cp.activations)
    interleaved = need_of(f"{base} --vpp-size 3", QWEN3_4B)
    # Interleaving keeps (pp - 1) / (pp * vpp) more.
    assert interleaved.activations * 6 == plain.activations * 7
    assert interleaved.states == plain.states


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            "--nodes 4 --cluster.gpu-memory-gib 20",
            "take 25 GiB of each trainer GPU, which has .*=20; "
            "raise the number of trainer GPUs, or .* training.tp_size",
        ),
        (
            "--nodes 4 --cluster.gpu-memory-gib 8 --tp-size 8 --pp-size 2",
            "7 GiB of each engine GPU.* raise it",
        ),
        (
            "--nodes 1 --colocate --cluster.gpu-memory-gib 12 --tp-size 8",
            "a GPU holds 16 GiB, .* raise rollout.engine_tp_size",
        ),
        (
            '--nodes 4 --cluster.gpu-memory-gib 26 --rollout.sglang={"mem_fraction_static":0.35} '
            "--max-new-tokens 30000",
            "a sequence of 31024 tokens, and an engine caches about 11...; lower them",
        ),
    ],
)
def test_what_fits_on_no_gpu_is_refused_with_value_place_and_way_out(flags, says):
    with pytest.raises(RunError, match=says):
        plan_of(f"--cluster.gpus-per-node 8 {flags}", QWEN3_4B)


def test_a_colocated_plan_shows_it_and_leaves_memory_to_the_sleeping_trainer():
    def cache_tokens(flags: str) -> int:
        config = config_of(f"--nodes 2 {H200} --tp-size 2 {flags}")
        text = describe(config, QWEN3_4B, plan(config, QWEN3_4B))
        assert ("one of the two sleeps" in text) == ("--colocate" in flags)
        found = re.search(r"about ([\d,]+) tokens of KV", text)
        assert found is not None
        return int(found[1].replace(",", ""))

    assert 0.7 < cache_tokens("--colocate") / cache_tokens("") < 0.85


def test_the_description_says_when_a_plan_may_not_fit():
    config = config_of(f"--nodes 1 {H200} --max-tokens-per-microbatch 65536")
    text = describe(config, QWEN3_4B, plan(config, QWEN3_4B))
    assert "MAY NOT FIT: lower training.max_tokens_per_microbatch" in text


def test_the_peak_of_fsdp_without_recomputation_is_near_what_a_gpu_needed():
    """An H200 held 41.3 GB at most in a step of 16,384 tokens (tools/BENCHMARKS.md)."""
    content = {**tiny_qwen3_config(), **QWEN3_06B, "tie_word_embeddings": True}
    training = TrainingConfig(backend="fsdp", max_tokens_per_microbatch=16_384)
    config = RunConfig(model=ModelConfig(dtype="bfloat16"), training=training)
    alone = ParallelDims(tp=1, pp=1, cp=1, ep=1, dp=1)
    need = estimate_memory(config, ModelShape.from_config(content), alone)
    assert need.trainer == pytest.approx(41.3e9, rel=0.1)
