"""What a plan must hold in memory, worked out by hand; and what fits on no GPU."""

import re
from dataclasses import replace

import pytest

from nanoslime.config import ClusterConfig, ModelConfig, RunConfig, TrainingConfig
from nanoslime.models.parallel_sizes import ParallelDims, PipelineSizes
from nanoslime.models.shape import ModelShape
from nanoslime.models.tiny import tiny_qwen3_config
from nanoslime.orchestration.launch import parse
from nanoslime.types import RunError
from tests.models.hf import make_model
from tests.models.published import CONFIGS
from tests.plans import H200, QWEN3_4B, QWEN3_30B_A3B, TINY, config_of, plan_of
from tools.gpu_checks import QWEN3_06B
from tools.memory.activations import Microbatch, activations_of_ranks
from tools.memory.estimate import estimate_memory
from tools.memory.host import slurm_bytes
from tools.memory.parts import GIB, DiskNeed, TrainerGPU
from tools.memory.plan import plan
from tools.memory.states import Sharding, rank_parameters
from tools.submit.choose import shortage
from tools.submit.memory_text import largest_budget, memory_lines
from tools.submit.plan_text import describe


def need_of(flags: str, shape: ModelShape) -> TrainerGPU:
    config = config_of(flags)
    trainer = estimate_memory(config, shape, plan(config, shape).parallel).trainer
    assert trainer is not None
    return trainer


def test_a_rank_has_whole_norms_and_its_part_of_the_rest(tmp_path):
    make_model("qwen3_untied").config.save_pretrained(tmp_path)
    shape = ModelShape.read(tmp_path)
    quarter = Sharding(tp_size=2, pipeline=PipelineSizes(pp_size=2))
    norms = 2 * 32 + 2 * 16
    layer = (32 * (4 + 2 + 2) * 16 + 4 * 16 * 32 + 3 * 32 * 48) // 2 + norms
    embedding = 256 * 32 // 2  # 250 rows, padded
    assert rank_parameters(shape, quarter, 0) == (2 * layer + embedding, 0)
    assert rank_parameters(shape, quarter, 1) == (2 * layer + embedding + 32, 0)


def test_each_rank_of_an_uneven_pipeline_has_its_layers():
    shape = replace(QWEN3_4B, num_layers=6, tie_word_embeddings=False)
    layer = shape.num_layer_parameters
    embedding = shape.num_embedding_parameters
    ends = Sharding(pipeline=PipelineSizes(pp_size=3, first=1, last=1))
    dense = [rank_parameters(shape, ends, rank)[0] for rank in range(3)]
    assert dense == [layer + embedding, 4 * layer, layer + embedding + shape.hidden_size]
    # The second rank has chunks of 2 and 2 layers, the first of 1 and 1.
    interleaved = Sharding(pipeline=PipelineSizes(pp_size=2, vpp_size=2, first=2))
    dense = [rank_parameters(shape, interleaved, rank)[0] for rank in range(2)]
    assert dense == [2 * layer + embedding, 4 * layer + embedding + shape.hidden_size]


def test_dense_layers_before_the_experts_are_not_counted_as_experts():
    shape = ModelShape.from_config(CONFIGS["DeepSeek-V3"])
    experts_of_layer = 256 * 3 * 7168 * 2048
    first = Sharding(pipeline=PipelineSizes(pp_size=2, first=60))
    assert rank_parameters(shape, first, 0)[1] == 57 * experts_of_layer
    assert rank_parameters(shape, first, 1)[1] == experts_of_layer


def test_experts_are_divided_over_their_own_ranks(tmp_path):
    make_model("qwen3_moe").config.save_pretrained(tmp_path)
    shape = ModelShape.read(tmp_path)
    experts = 4 * 4 * 3 * 32 * 16  # layers, experts, matrices of an expert
    # Of the 8 ranks, 2 have the same experts.
    sharding = Sharding(tp_size=2, dp_size=4, expert_ways=4)
    assert rank_parameters(shape, sharding, 0)[1] == experts // 4
    need = need_of("--nodes 4 --tp-size 2 --ep-size 2 --sequence-parallel", shape)
    dense_here, experts_here = rank_parameters(shape, Sharding(tp_size=2, expert_ways=2), 0)
    assert experts_here == experts // 2
    assert need.weights == 2 * (dense_here + experts_here)
    assert need.gradients == 4 * (dense_here + experts_here)
    # Four ranks: two have the same dense weights, two the same experts.
    assert need.optimizer == 12 * (dense_here + experts_here) // 2


def test_the_rank_with_most_layers_in_flight_keeps_the_activations():
    base = "--nodes 4 --cluster.slots-per-node 8 --pp-size 4"
    equal = need_of(base, QWEN3_4B).activations  # 9 layers of 4 micro-batches
    first = need_of(f"{base} --decoder-first-pipeline-num-layers 3", QWEN3_4B).activations
    # The second rank has 11 layers of 3 micro-batches.
    assert first / equal == pytest.approx(11 / 12, rel=1e-3)


def test_memory_of_a_model_worked_out_by_hand():
    config = config_of("--nodes 4 --tp-size 2 --pp-size 2")
    parallel = plan(config, TINY).parallel
    layer = (64 * (2 * 64 + 2 * 32) + 3 * 64 * 128) // 2 + 2 * 64 + 2 * 16
    last_rank = layer + 320 * 64 // 2 + 64
    memory = estimate_memory(config, TINY, parallel)
    need = memory.trainer
    assert need is not None
    # In this small model the logprobs make the last of the two the fullest.
    assert (need.weights, need.gradients) == (2 * last_rank, 4 * last_rank)
    assert need.optimizer == 12 * last_rank
    # Keys and values, layers, groups, head_dim, bfloat16.
    assert memory.engine is not None
    assert memory.engine.kv_bytes_per_token == 2 * 2 * 2 * 16 * 2

    offloaded = replace(config, training=replace(config.training, optimizer_offload=True))
    memory = estimate_memory(offloaded, TINY, parallel)
    assert memory.trainer is not None
    assert memory.trainer.optimizer == 0
    # A node has two of the ranks.
    assert memory.node.offloaded == 2 * 12 * last_rank

    freeze = ["embed_tokens", "lm_head"]
    frozen = replace(config, training=replace(config.training, freeze=freeze))
    frozen_need = estimate_memory(frozen, TINY, parallel).trainer
    assert frozen_need is not None
    share = frozen_need.gradients / need.gradients
    assert share == pytest.approx(1 - 2 * 320 * 64 / TINY.num_parameters, rel=1e-3)


def test_reference_weights_wait_in_main_memory():
    config = config_of("--nodes 4 --tp-size 2 --pp-size 2")
    parallel = plan(config, TINY).parallel
    plain = estimate_memory(config, TINY, parallel)
    reference = replace(config, algorithm=replace(config.algorithm, kl_coef=0.1))
    need = estimate_memory(reference, TINY, parallel)
    assert need.trainer == plain.trainer
    assert plain.node.reference == 0
    assert plain.trainer is not None
    # Two ranks of a node keep the reference's and have room for the policy's.
    assert need.node.reference == pytest.approx(2 * 2 * plain.trainer.weights, rel=0.01)


def test_context_parallel_ranks_share_the_optimizer_state_and_interleaving_keeps_more_activations():
    base = "--nodes 4 --cluster.slots-per-node 8 --tp-size 2 --pp-size 2"
    plain = need_of(base, QWEN3_4B)
    with_cp = need_of(f"{base} --cp-size 2", QWEN3_4B)
    assert plain.states == with_cp.states
    interleaved = need_of(f"{base} --vpp-size 3", QWEN3_4B)
    # Interleaving keeps (pp - 1) / (pp * vpp) more.
    assert interleaved.activations / plain.activations == pytest.approx(7 / 6, rel=1e-3)
    assert interleaved.states == plain.states


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            "--nodes 4 --cluster.gpu-memory-gib 20",
            "take 25 GiB of each trainer GPU, which has .*=20 and .* CUDA and NCCL; "
            "raise the number of trainer GPUs, or .* training.tp_size",
        ),
        (
            "--nodes 4 --cluster.gpu-memory-gib 8 --tp-size 8 --pp-size 2",
            "7 GiB of each engine GPU.* raise it",
        ),
        (
            "--nodes 1 --colocate --cluster.gpu-memory-gib 12 --tp-size 8",
            "a GPU holds 20 GiB, .* raise rollout.engine_tp_size",
        ),
        (
            '--nodes 4 --cluster.gpu-memory-gib 30 --rollout.sglang={"mem_fraction_static":0.308} '
            "--max-new-tokens 30000",
            "a sequence of 31024 tokens, and an engine caches about 12...; lower them",
        ),
    ],
)
def test_what_fits_on_no_gpu_is_refused_with_value_place_and_way_out(flags, says):
    with pytest.raises(RunError, match=says):
        plan_of(f"--cluster.gpus-per-node 8 {flags}", QWEN3_4B)


LONG_4B = replace(QWEN3_4B, max_position_embeddings=1 << 17)
# The environment of the job is not here to look at: it is taken to have Transformer Engine.
EIGHT = "--cluster.gpus-per-node 8 --cluster.venv /not/here"


def test_the_longest_sequence_counts_although_the_budget_is_small():
    flags = f"--nodes 4 {EIGHT} --tp-size 2 --cluster.gpu-memory-gib 200"
    short = need_of(flags, LONG_4B)
    long = need_of(f"{flags} --max-new-tokens 31744", LONG_4B)
    assert long.activations == short.activations
    assert (long.budget_tokens, long.longest_tokens) == (8192, 32_768)
    assert long.longest_activations == pytest.approx(4 * short.activations, rel=1e-6)
    # Two ranks share each sequence; the formulas for Transformer Engine know no more.
    shared = need_of(f"{flags} --cp-size 2 --max-new-tokens 31744", LONG_4B)
    assert shared.longest_tokens == 16_384
    assert shared.longest_activations == pytest.approx(2 * short.activations, rel=1e-6)


@pytest.mark.parametrize(
    "way_out", ["--training.recompute", "--cp-size 4", "--tp-size 4 --sequence-parallel"]
)
def test_a_sequence_that_fits_no_gpu_is_refused_and_the_ways_out_are_ways_out(way_out):
    flags = f"--nodes 4 {EIGHT} --tp-size 2 --max-new-tokens 31744"
    says = (
        "make a sequence that has a micro-batch for itself, 32768 tokens .* take 76 GiB beside "
        "17 GiB .* lower rollout.max_new_tokens .* set training.recompute, or raise "
        "training.cp_size, or raise training.tp_size with --sequence-parallel"
    )
    with pytest.raises(RunError, match=says):
        plan_of(flags, LONG_4B)
    plan_of(f"{flags} {way_out}", LONG_4B)


def test_experts_that_fit_no_gpu_are_told_to_be_spread():
    flags = f"--nodes 4 {EIGHT} --tp-size 2 --sequence-parallel"
    with pytest.raises(
        RunError, match=r"states? take .* GiB .* training.ep_size, training.tp_size"
    ):
        plan_of(flags, QWEN3_30B_A3B)
    plan_of(f"{flags} --ep-size 8", QWEN3_30B_A3B)


def test_the_largest_budget_that_fits_is_the_largest():
    flags = f"--nodes 4 {EIGHT} --tp-size 2 --max-tokens-per-microbatch"
    config = config_of(f"{flags} 65536")
    parallel = plan(config, LONG_4B).parallel
    largest = largest_budget(config, LONG_4B, parallel)
    assert f"to {largest} or less" in "\n".join(memory_lines(config, LONG_4B, parallel))
    assert need_of(f"{flags} {largest}", LONG_4B).total <= 80 * GIB
    assert need_of(f"{flags} {largest + 512}", LONG_4B).total > 80 * GIB


def test_a_node_without_room_for_sleeping_trainers_is_refused():
    flags = f"--nodes 2 {EIGHT} --colocate --tp-size 2"
    config = config_of(flags)
    trainer = need_of(flags, LONG_4B)
    node = estimate_memory(config, LONG_4B, plan(config, LONG_4B).parallel).node
    assert node.sleeping == 8 * (trainer.weights + trainer.optimizer)
    assert node.available is None
    plan_of(f"{flags} --cluster.memory-per-node 200G", LONG_4B)
    with pytest.raises(RunError, match=r"for tensors \(sleeping trainers .* gives it 32 GiB"):
        plan_of(f"{flags} --cluster.memory-per-node 32G", LONG_4B)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("", None), ("0", None), ("64000", 64_000 << 20), ("64G", 64 << 30), ("1T", 1 << 40)],
)
def test_memory_is_read_as_sbatch_reads_it(text, num_bytes):
    assert slurm_bytes(text) == num_bytes


def test_the_disk_holds_the_checkpoints_that_are_kept_and_the_one_being_written():
    flags = f"--nodes 2 {EIGHT} --num-rollout 100 --checkpoint.interval 10"
    parameters = LONG_4B.num_parameters

    def disk(more: str = "") -> DiskNeed:
        config = config_of(f"{flags} {more}")
        return estimate_memory(config, LONG_4B, plan(config, LONG_4B).parallel).disk

    # Weights, main parameters and two moments; the export in bfloat16.
    assert (disk().checkpoint, disk().export) == (14 * parameters, 2 * parameters)
    assert disk().checkpoints == 3
    assert disk("--checkpoint.keep-every 20").checkpoints == 3 + 5
    assert disk("--checkpoint.interval 0").checkpoints == 1


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


@pytest.mark.parametrize(
    ("backend", "tokens", "recompute", "measured_gb"),
    [
        ("megatron", 16_384, False, 34.7),
        ("megatron", 65_536, True, 19.1),
        ("fsdp", 16_384, False, 41.3),
        ("fsdp", 65_536, True, 17.3),
    ],
)
def test_the_peak_is_near_what_a_gpu_needed(backend, tokens, recompute, measured_gb):
    """The peaks of an H200 without Transformer Engine (tools/BENCHMARKS.md), in one micro-batch:
    FSDP then has no gradients yet when it has all activations."""
    content = {**tiny_qwen3_config(), **QWEN3_06B, "tie_word_embeddings": True}
    training = TrainingConfig(
        backend=backend, max_tokens_per_microbatch=tokens, recompute=recompute, allow_slow=True
    )
    cluster = ClusterConfig(gpus_per_node=1)
    config = RunConfig(model=ModelConfig(dtype="bfloat16"), training=training, cluster=cluster)
    alone = ParallelDims(tp=1, pp=1, cp=1, ep=1, dp=1)
    need = estimate_memory(config, ModelShape.from_config(content), alone).trainer
    assert need is not None
    held = need.at_budget - need.reserve
    if backend == "fsdp":
        held -= need.gradients
    assert held == pytest.approx(measured_gb * 1e9, rel=0.05)


def test_a_budget_above_the_longest_sequence_hides_no_refusal():
    flags = f"--nodes 4 {EIGHT} --max-new-tokens 36000 --max-tokens-per-microbatch"
    for budget in (8192, 40_000):
        with pytest.raises(RunError, match="37024 tokens of it on a trainer GPU, .* take 1.. GiB"):
            plan_of(f"{flags} {budget}", LONG_4B)
    # It fits with a lower budget only, so the plan shows that.
    short = config_of(f"--nodes 4 {EIGHT} --max-tokens-per-microbatch 40000")
    layout = plan(short, LONG_4B)
    assert "MAY NOT FIT: lower training.max_tokens" in describe(short, LONG_4B, layout)
    assert re.match(r"a trainer GPU needs 1\d\d of 80 GiB", shortage(short, LONG_4B, layout))


def test_no_lower_budget_is_named_where_none_helps():
    """The longest sequence fits without headroom, whatever the budget is."""
    flags = f"--nodes 4 {EIGHT} --tp-size 2 --max-new-tokens 31744 --cluster.gpu-memory-gib"
    config = config_of(f"{flags} 94")
    layout = plan(config, LONG_4B)
    assert largest_budget(config, LONG_4B, layout.parallel) == 0
    text = describe(config, LONG_4B, layout)
    assert "MAY NOT FIT: set training.recompute, or raise training.cp_size" in text


def test_an_engine_must_cache_the_longest_answer_of_an_evaluation():
    engine = '--cluster.gpu-memory-gib 30 --rollout.sglang={"mem_fraction_static":0.308}'
    flags = f"--cluster.gpus-per-node 8 --nodes 4 --training.recompute {engine}"
    plan_of(flags, LONG_4B)
    long = '--eval.sets {"name":"b","prompts":"b","max_new_tokens":30000}'
    with pytest.raises(
        RunError, match=r"eval.sets.0.max_new_tokens=30000 make a sequence of 31024"
    ):
        plan_of(f"{flags} {long}", LONG_4B)
    config = config_of(f"--nodes 4 {EIGHT} {long}")
    need = estimate_memory(config, LONG_4B, plan(config, LONG_4B).parallel)
    assert need.engine and need.engine.longest_tokens == 31_024
    assert need.trainer and need.trainer.longest_tokens == 2048


def test_a_run_on_this_machine_that_cannot_fit_is_refused_before_it_has_a_directory(tmp_path):
    words = ["--mock", "--num-gpus", "2", "--run-root", str(tmp_path / "runs")]
    with pytest.raises(RunError, match=r"^a node needs .* of main memory for tensors"):
        parse([*words, "--cluster.memory-per-node", "1M"])
    assert not (tmp_path / "runs").exists()
    assert parse([*words, "--cluster.memory-per-node", "1T"]).attempt.number == 1


def test_a_stage_whose_first_chunk_has_more_layers_holds_most_after_the_first_backward():
    """Stages of 1, 3, 1 and 2 layers on two ranks: the last one runs 3 + 3 + 2 layers before its
    first backward, and later waits with its first chunk three times.
    """
    training = TrainingConfig(pp_size=2, vpp_size=2, num_layers_in_first_pipeline_stage=2)
    config = RunConfig(model=ModelConfig(dtype="float32"), training=training)
    shape = replace(QWEN3_4B, num_layers=7)
    assert [len(s) for s in PipelineSizes.of(training).stages(7)] == [1, 3, 1, 2]
    first, last = activations_of_ranks(
        config,
        shape,
        ParallelDims(tp=1, pp=2, cp=1, ep=1, dp=1),
        Microbatch(tokens=1024, length=1024),
    )
    assert last / first == pytest.approx(9 / 5, rel=0.02)
