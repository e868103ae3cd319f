"""Which slot does what: the plans that are promised, what is refused and how; no slot is used twice."""

import re
from dataclasses import replace
from itertools import product

import pytest

from nanoslime.config.load import load
from nanoslime.layout import Layout, ParallelDims, check_kernels, describe, memory, plan
from nanoslime.models.shape import ModelShape
from nanoslime.types import RunError
from tests.models.published import CONFIGS

TINY = ModelShape(
    model_type="qwen3",
    num_layers=2,
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=320,
    max_position_embeddings=128,
    tie_word_embeddings=False,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    qk_norm=True,
)
QWEN3_4B = replace(
    TINY,
    num_layers=36,
    hidden_size=2560,
    intermediate_size=9728,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
    tie_word_embeddings=True,
)
H200 = "--cluster.gpus-per-node 8 --cluster.gpu-memory-gib 140"


def make(flags: str, shape: ModelShape = TINY) -> Layout:
    return plan(load(None, None, flags.split()), shape)


def nodes_of(places) -> list[int]:
    return sorted({place.node for place in places})


def test_the_rehearsal_has_trainers_on_the_first_two_nodes_and_one_engine_on_each_other():
    layout = make("--nodes 4 --tp-size 2 --pp-size 2 --rollout.engines-per-node 1")
    assert layout.parallel == ParallelDims(tp=2, pp=2, cp=1, ep=1, dp=1)
    assert [(t.rank, t.node, t.slot) for t in layout.trainers] == [
        (0, 0, 0),
        (1, 0, 1),
        (2, 1, 0),
        (3, 1, 1),
    ]
    assert [(e.index, e.node, e.slots) for e in layout.engines] == [(0, 2, (0,)), (1, 3, (0,))]
    assert [layout.roles(n) for n in range(4)] == ["trainer", "trainer", "engine", "engine"]
    assert (nodes_of(layout.trainers), nodes_of(layout.engines)) == ([0, 1], [2, 3])


def test_ranks_run_along_tp_then_cp_then_dp_then_pp():
    dims = ParallelDims(tp=2, pp=2, cp=2, ep=1, dp=2)
    order = [
        tuple(dims.coordinates(rank)[name] for name in ("pp", "dp", "cp", "tp"))
        for rank in range(16)
    ]
    assert order == list(product(range(2), repeat=4))
    assert dims.world_size == 16


@pytest.mark.parametrize(
    ("flags", "engines"),
    [
        ("", 8),
        ("--engine-tp-size 2", 4),
        ("--engine-tp-size 4", 2),
        ("--rollout.engines-per-node 3", 3),
    ],
)
def test_engines_fill_the_gpus_of_their_nodes(flags, engines):
    layout = make(f"--nodes 2 {H200} --tp-size 2 {flags}", QWEN3_4B)
    assert len(layout.engines) == engines
    assert {e.node for e in layout.engines} == {1}


@pytest.mark.parametrize(("nodes", "rollout"), [(2, 1), (3, 1), (4, 2), (5, 2)])
def test_half_of_the_nodes_rounded_down_hold_engines(nodes, rollout):
    layout = make(f"--nodes {nodes}")
    assert len(nodes_of(layout.engines)) == rollout
    assert nodes_of(layout.trainers) == list(range(nodes - rollout))


def test_one_node_falls_back_to_fsdp_with_engines_on_half_of_its_gpus():
    layout = make(f"--nodes 1 {H200}", QWEN3_4B)
    assert layout.backend == "fsdp"
    assert layout.parallel.dp == 4
    assert [t.slot for t in layout.trainers] == [0, 1, 2, 3]
    assert [e.slots for e in layout.engines] == [(4,), (5,), (6,), (7,)]
    assert layout.roles(0) == "trainer+engine"


def test_recorded_rollouts_leave_all_slots_to_trainers():
    flags = f"--nodes 2 {H200} --tp-size 2 --load-rollouts runs/x"
    layout = make(flags, QWEN3_4B)
    assert (layout.engines, layout.parallel.dp) == ((), 8)
    assert [layout.roles(n) for n in range(2)] == ["trainer", "trainer"]
    text = describe(load(None, None, flags.split()), QWEN3_4B, layout)
    assert "engines   none: recorded rollouts" in text and "engine:" not in text
    assert [
        t.slot for t in make("--nodes 1 --cluster.slots-per-node 1 --load-rollouts r").trainers
    ] == [0]
    assert len(make("--nodes 1 --num-gpus 3 --load-rollouts runs/x").trainers) == 3


def test_rollout_only_leaves_all_slots_to_engines():
    flags = f"--nodes 2 {H200} --tp-size 3 --engine-tp-size 2 --rollout-only"  # the trainer's TP does not matter
    layout = make(flags, QWEN3_4B)
    assert (layout.trainers, len(layout.engines), nodes_of(layout.engines)) == ((), 8, [0, 1])
    text = describe(load(None, None, flags.split()), QWEN3_4B, layout)
    assert "trainers  none" in text and "memory    engine:" in text and "trainer:" not in text
    assert Layout.from_json(layout.to_json()) == layout
    assert make("--nodes 1 --cluster.slots-per-node 1 --rollout-only").engines[0].slots == (0,)
    assert make("--nodes 1 --rollout-only --engine embedded").engines == ()


@pytest.mark.parametrize(
    ("flags", "trainers", "engine_slots"),
    [
        (f"{H200} --engine-gpus 2", [0, 1, 2, 3, 4, 5], [6, 7]),
        (f"{H200} --num-gpus 3", [0, 1, 2], [3, 4, 5, 6, 7]),
        (f"{H200} --num-gpus 3 --engine-gpus 2", [0, 1, 2], [6, 7]),
        ("--num-gpus 4", [0, 1, 2, 3], [4]),
        ("--num-gpus 2 --engine embedded", [0, 1], []),
        ("--cluster.slots-per-node 1 --engine embedded", [0], []),
        (f"{H200} --engine embedded", list(range(8)), []),
    ],
)
def test_one_node_is_shared_as_asked(flags, trainers, engine_slots):
    layout = make(flags, QWEN3_4B)
    assert [t.slot for t in layout.trainers] == trainers
    assert [slot for e in layout.engines for slot in e.slots] == engine_slots


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        (f"--nodes 2 {H200} --tp-size 2", [[i] for i in range(16)]),
        (
            f"--nodes 2 {H200} --engine-tp-size 4",
            [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]],
        ),
        ("--nodes 2 --rollout.engines-per-node 1", [[0], [2]]),
        ("--nodes 1 --num-gpus 2", [[0], [1]]),
        (f"--nodes 1 {H200} --num-gpus 4 --engine-tp-size 2", [[0, 1], [2, 3]]),
    ],
)
def test_colocated_engines_take_the_slots_of_trainers(flags, ranks):
    layout = make(f"{flags} --colocate", QWEN3_4B)
    assert [layout.ranks_at(engine) for engine in layout.engines] == ranks
    assert all(layout.roles(node) == "trainer+engine" for node in range(layout.num_nodes))
    assert (
        len(layout.trainers) == layout.parallel.world_size > len(layout.engines)
        or len(ranks[0]) == 1
    )


def test_a_colocated_plan_shows_it_and_leaves_memory_to_the_sleeping_trainer():
    def tokens(flags: str) -> int:
        config = load(None, None, f"--nodes 2 {H200} --tp-size 2 {flags}".split())
        text = describe(config, QWEN3_4B, plan(config, QWEN3_4B))
        assert ("one of the two sleeps" in text) == ("--colocate" in flags)
        return int(re.findall(r"about ([\d,]+) tokens of KV", text)[0].replace(",", ""))

    assert 0.7 < tokens("--colocate") / tokens("") < 0.85


def test_the_embedded_engine_takes_no_node():
    layout = make("--nodes 4 --engine embedded")
    assert (nodes_of(layout.trainers), layout.engines) == ([0, 1, 2, 3], ())


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            "--nodes 4 --tp-size 3",
            "training.tp_size=3 does not divide num_attention_heads=32; choose 1, 2, 4 or 8",
        ),
        (
            f"--nodes 4 {H200} --tp-size 16",
            "tp_size=16 does not divide num_key_value_heads=8; choose 1, 2, 4 or 8",
        ),
        (
            "--nodes 4 --tp-size 8 --cluster.slots-per-node 4",
            "must lie in one node, .* its 4 slots; choose 1, 2 or 4",
        ),
        (
            "--nodes 4 --pp-size 5",
            "training.pp_size=5 does not divide num_layers=36; choose 1, 2, 3, 4, 6, 9",
        ),
        (
            "--nodes 2 --tp-size 2 --pp-size 2 --cluster.slots-per-node 2",
            r"pp_size=2 = 4 does not divide the 2 trainer CPU slots; choose TP x PP 1 x 1, 1 x 2 or 2",
        ),
        ("--nodes 4 --rollout-nodes 4", "cluster.rollout_nodes=4 of cluster.nodes=4: choose 1-3"),
        (
            "--nodes 1 --rollout-nodes 1",
            r"rollout_nodes=1 of cluster.nodes=1: with one node engines share it",
        ),
        ("--nodes 4 --rollout-nodes 0", "SGLang engines need nodes; choose 1-3"),
        ("--nodes 4 --rollout-nodes 2 --engine embedded", "embedded engine needs no nodes; set 0"),
        (
            "--nodes 4 --engine-tp-size 16",
            "engine_tp_size=16 exceeds the 8 slots of a node; choose 1, 2, 4 or 8",
        ),
        (
            "--nodes 4 --engine-tp-size 3",
            "engine_tp_size=3 does not fit num_attention_heads=32 .* choose 1, 2, 4 or 8",
        ),
        (
            "--nodes 4 --engine-tp-size 4 --rollout.engines-per-node 3",
            "node 2 has for engines; choose .* at most 2",
        ),
        (
            "--nodes 1 --engine-gpus 2 --engine-tp-size 4",
            "the 2 GPUs that node 0 has for engines; choose engine_tp",
        ),
        ("--nodes 1 --engine-gpus 8", "cluster.engine_gpus=8 of 8 GPUs; choose 1-7"),
        ("--nodes 1 --engine-gpus 0", "cluster.engine_gpus=0 of 8 GPUs; choose 1-7"),
        ("--nodes 1 --engine-gpus 2 --engine embedded", "takes no GPU of its own; set 0"),
        (
            "--nodes 1 --num-gpus 8",
            "num_gpus=8: of the node's 8 GPUs 1 or more are for engines; choose at most 7",
        ),
        (
            "--nodes 2 --colocate --rollout-nodes 1",
            "rollout_nodes=1 with cluster.colocate: engines then share the",
        ),
        (
            "--nodes 1 --colocate --engine-gpus 1",
            "engine_gpus=1 with cluster.colocate: engines then share the",
        ),
        (
            "--nodes 2 --colocate --engine embedded",
            "colocate with rollout.engine=embedded: it has nothing to share",
        ),
        (
            "--nodes 2 --colocate --num-gpus 3",
            "num_gpus=3: a job of 2 nodes has 2 x 8 = 16 trainer ranks",
        ),
        (
            "--nodes 1 --colocate --num-gpus 9",
            "num_gpus=9: of the node's 8 GPUs 0 or .*; choose at most 8",
        ),
        (
            "--nodes 1 --colocate --cluster.gpu-memory-gib 12 --tp-size 8",
            "a GPU holds 16 GiB, .* raise rollout.engine_tp_size",
        ),
        ("--nodes 4 --num-gpus 3", r"2 x 8 = 16 trainer ranks; leave it out"),
        (
            "--nodes 1 --cluster.gpus-per-node 1",
            "has no room for an SGLang engine .* use --colocate or --engine embedded",
        ),
        (
            "--nodes 4 --cp-size 3",
            "training.cp_size=3 does not divide the 16 trainer .*; choose 1, 2, 4, 8 or 16",
        ),
        (
            "--nodes 4 --tp-size 8 --cp-size 2 --pp-size 3",
            "tp_size=8 x training.cp_size=2 x training.pp_size=3 = 48 does not divide the 16 .* 8 x 1,",
        ),
        (
            "--nodes 4 --vpp-size 2",
            "training.vpp_size=2 needs training.pp_size of 2 or more; choose 1",
        ),
        (
            "--nodes 4 --pp-size 4 --vpp-size 2",
            "vpp_size=2 does not divide the 9 layers of a rank with training.pp_size=4; choose 1, 3 or 9",
        ),
        ("--nodes 4 --backend fsdp --cp-size 2", "training.cp_size=2 needs --backend megatron"),
        ("--nodes 4 --backend fsdp --vpp-size 2", "training.vpp_size=2 needs --backend megatron"),
        (
            "--nodes 4 --ep-size 2",
            r"training.ep_size=2 must divide a qwen3, which has no experts, .*; choose one of \[1\]",
        ),
        (
            "--nodes 4 --backend fsdp --tp-size 2",
            "training.tp_size=2 needs --backend megatron; with fsdp set 1",
        ),
        ("--nodes 4 --backend fsdp --pp-size 2", "training.pp_size=2 needs --backend megatron"),
        (
            "--nodes 4 --rollout-batch-size 3 --n-samples-per-prompt 2",
            "gives 6 samples per optimizer step for DP=16; choose sizes with a product of at least 16",
        ),
        (
            "--nodes 4 --cluster.gpu-memory-gib 20",
            "take 25 GiB of each trainer GPU, which has .*=20; raise training.tp",
        ),
        (
            "--nodes 4 --cluster.gpu-memory-gib 8 --tp-size 8 --pp-size 2",
            "7 GiB of each engine GPU.* raise it",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_value_place_and_way_out(flags, says):
    slots = (
        ""
        if "slots-per-node" in flags
        else "--cluster.gpus-per-node 8 --cluster.gpu-memory-gib 140"
    )
    with pytest.raises(RunError, match=says):
        make(f"{slots} {flags}", QWEN3_4B)


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
        make("--nodes 4 --backend megatron", shape)


A3B = ModelShape.from_config(CONFIGS["Qwen3-30B-A3B"])  # 128 experts of 768


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
            r"training.ep_size=3 must divide num_experts=128, .* the 16 ranks .*\[1, 2, 4, 8, 16\]",
        ),
        (
            "--ep-size 16 --pp-size 2",
            r"ep_size=16 must divide .* the 8 ranks of a .*\[1, 2, 4, 8\]",
        ),
        (
            "--etp-size 5",
            r"training.etp_size=5 must divide moe_intermediate_size=768, .*\[1, 2, 4, 8, 16\]",
        ),
        (
            "--ep-size 8 --etp-size 4",
            r"etp_size=4 must divide .* training.etp_size the 16 .*\[1, 2\]",
        ),
    ],
)
def test_experts_that_do_not_fit_are_refused_with_the_way_out(flags, says):
    with pytest.raises(RunError, match=says):
        make(f"--nodes 4 {H200} {flags}", A3B)


def test_a_pattern_of_frozen_tensors_that_matches_none_is_refused_before_submission():
    config = load(None, None, f"--nodes 4 {H200} --tp-size 2".split())
    frozen = replace(config, training=replace(config.training, freeze=["embed_token", "gate_porj"]))
    with pytest.raises(
        RunError, match="'gate_porj' is found in no tensor of the model.*mlp.gate_proj"
    ):
        plan(frozen, QWEN3_4B)


def test_layers_without_experts_are_refused_where_sglang_would_take_them_for_sparse():
    shape = ModelShape.from_config(CONFIGS["Qwen3-30B-A3B"] | {"mlp_only_layers": [0, 5]})
    with pytest.raises(
        RunError, match="experts in all layers of a qwen3_moe, this one in 46; use --engine"
    ):
        make(f"--nodes 4 {H200} --ep-size 8 --allow-slow", shape)
    make(f"--nodes 4 {H200} --ep-size 8 --allow-slow --engine embedded", shape)


def test_experts_may_be_spread_over_all_ranks_of_a_pipeline_stage():
    layout = make(
        f"--nodes 4 {H200} --tp-size 4 --sequence-parallel --pp-size 2 --ep-size 4 --etp-size 2 --allow-slow",
        A3B,
    )
    assert (layout.parallel.ep, layout.parallel.dp) == (4, 2)


def test_every_accepted_plan_has_all_ranks_and_no_slot_twice():
    accepted = 0
    sizes = product(
        (1, 2, 3, 4), (1, 2, 4), (1, 2), (1, 2), (None, 1, 2), (1, 2), ("sglang", "embedded")
    )
    base = load(None, None, ["--backend", "megatron"])
    for nodes, slots, tp, pp, rollout_nodes, engine_tp, engine in sizes:
        config = replace(
            base,
            cluster=replace(
                base.cluster, nodes=nodes, slots_per_node=slots, rollout_nodes=rollout_nodes
            ),
            training=replace(base.training, tp_size=tp, pp_size=pp),
            rollout=replace(base.rollout, engine_tp_size=engine_tp, engine=engine),
        )
        try:
            layout = plan(config, TINY)
        except RunError:
            continue
        accepted += 1
        used = [(t.node, t.slot) for t in layout.trainers] + [
            (e.node, s) for e in layout.engines for s in e.slots
        ]
        assert len(used) == len(set(used))
        assert all(0 <= node < nodes and 0 <= slot < slots for node, slot in used)
        assert [t.rank for t in layout.trainers] == list(range(layout.parallel.world_size))
        assert [e.index for e in layout.engines] == list(range(len(layout.engines)))
        assert bool(layout.engines) == (engine == "sglang")
        for t in layout.trainers:  # a tensor-parallel group never leaves its node
            first = t.rank - layout.parallel.coordinates(t.rank)["tp"]
            assert layout.trainers[first].node == t.node
        assert Layout.from_json(layout.to_json()) == layout
    assert accepted > 100


def test_memory_of_a_model_worked_out_by_hand():
    config = load(None, None, "--nodes 4 --tp-size 2 --pp-size 2".split())
    need = memory(config, TINY, plan(config, TINY))
    layer = 64 * (2 * 64 + 2 * 32) + 2 * 64 + 2 * 16 + 3 * 64 * 128
    embedding = 320 * 64
    rank = (layer + embedding) // 2  # one of two layers and one of two embeddings, cut in two
    assert need.states == pytest.approx(rank * 18, rel=1e-3)
    assert (
        need.kv_bytes_per_token == 2 * 2 * 2 * 16 * 2
    )  # keys and values, layers, groups, head_dim, bfloat16
    assert need.activations == 8192 * 2 * 1 * 2 * (4 * 64 + (2 * 64 + 2 * 32 + 3 * 128) // 2)
    with_reference = replace(config, algorithm=replace(config.algorithm, kl_coef=0.1))
    assert (
        memory(with_reference, TINY, plan(config, TINY)).states == need.states
    )  # it waits on the CPU
    offloaded = replace(config, training=replace(config.training, optimizer_offload=True))
    assert memory(offloaded, TINY, plan(config, TINY)).states == pytest.approx(rank * 6, rel=1e-3)
    frozen = replace(config, training=replace(config.training, freeze=["embed_tokens", "lm_head"]))
    share = layer / (layer + embedding)
    assert memory(frozen, TINY, plan(frozen, TINY)).states == pytest.approx(
        rank * (2 + 16 * share), rel=1e-3
    )


def test_context_parallel_ranks_share_the_optimizer_state_and_interleaving_keeps_more_activations():
    def need(sizes):
        config = load(
            None, None, f"--nodes 4 --cluster.slots-per-node 8 --tp-size 2 {sizes}".split()
        )
        return memory(config, QWEN3_4B, plan(config, QWEN3_4B))

    plain, spread = need("--pp-size 2"), need("--pp-size 2 --cp-size 2")
    assert (plain.states, plain.activations) == (spread.states, spread.activations)
    interleaved = need("--pp-size 2 --vpp-size 3")
    assert interleaved.activations * 6 == plain.activations * 7  # (pp - 1) / (pp vpp) more
    assert interleaved.states == plain.states


def test_the_description_shows_context_parallelism_and_interleaving():
    flags = f"--nodes 4 {H200} --tp-size 2 --cp-size 2 --pp-size 2 --vpp-size 9 --allow-slow"
    config = load(None, None, flags.split())
    layout = plan(config, QWEN3_4B)
    assert layout.parallel == ParallelDims(tp=2, pp=2, cp=2, ep=1, dp=2)
    assert "Megatron: TP=2 CP=2 PP=2 (interleaved by 9) DP=2" in describe(config, QWEN3_4B, layout)
    assert [line.split()[3:7] for line in layout.table().splitlines()[1:3]] == [
        ["0-1", "0-1", "0-1", "0"],
        ["0-1", "0-1", "0-1", "1"],
    ]


def test_what_is_slow_without_transformer_engine_needs_to_be_allowed_on_gpus(tmp_path):
    flags = f"--nodes 4 {H200} --cp-size 2 --cluster.venv {tmp_path}"
    with pytest.raises(RunError, match=r"cp_size=2: without Transformer Engine .* by --allow-slow"):
        make(flags, QWEN3_4B)
    assert make(f"{flags} --allow-slow", QWEN3_4B).parallel.cp == 2
    assert make("--nodes 4 --cp-size 2").parallel.cp == 2  # no GPUs
    assert make(f"{flags}/elsewhere", QWEN3_4B).parallel.cp == 2  # the nodes will say
    (tmp_path / "lib/python3.11/site-packages/transformer_engine").mkdir(parents=True)
    assert make(flags, QWEN3_4B).parallel.cp == 2


def test_experts_without_transformer_engine_need_to_be_allowed():
    training = load(None, None, ["--backend", "megatron"]).training
    with pytest.raises(
        RunError, match="qwen3_moe: without Transformer Engine experts .* by --allow-slow"
    ):
        check_kernels(training, A3B, transformer_engine=False)
    check_kernels(replace(training, allow_slow=True), A3B, transformer_engine=False)
    check_kernels(training, A3B, transformer_engine=True)
    check_kernels(training, QWEN3_4B, transformer_engine=False)


def test_the_description_says_what_a_person_needs_to_know():
    config = load(None, None, f"--nodes 4 {H200} --tp-size 2 --time-limit-min 90".split())
    text = describe(config, QWEN3_4B, plan(config, QWEN3_4B))
    assert "4 x 8 GPUs; at most 48 GPU hours (32 GPUs for 1.5 h)" in text
    assert "Megatron: TP=2 CP=1 PP=1 DP=8" in text
    assert "SGLang: 16 of 1 GPU(s) each" in text
    assert [line.split() for line in text.splitlines()[-4:]] == [
        ["0", "trainer", "0-7", "0-1", "0", "0-3", "0", "-", "-"],
        ["1", "trainer", "8-15", "0-1", "0", "4-7", "0", "-", "-"],
        ["2", "engine", *"-----", "0-7", "0-7"],
        ["3", "engine", *"-----", "8-15", "0-7"],
    ]


def test_the_description_says_that_one_node_means_fsdp_and_when_a_plan_may_not_fit():
    config = load(None, None, f"--nodes 1 {H200} --max-tokens-per-microbatch 65536".split())
    text = describe(config, QWEN3_4B, plan(config, QWEN3_4B))
    assert "FSDP2 (what one node gets without --backend)" in text
    assert "MAY NOT FIT: lower training.max_tokens_per_microbatch" in text
