"""Which slot does what: the plans that are promised, what is refused and how; no slot
is used twice."""

from dataclasses import replace
from itertools import product

import pytest

from nanoslime.config import RunConfig
from nanoslime.layout import Layout
from nanoslime.models.parallel_sizes import ParallelDims
from nanoslime.models.shape import ModelShape
from nanoslime.types import RunError
from tests.models.published import CONFIGS
from tests.plans import H200, QWEN3_4B, TINY, config_of, plan_of
from tools.memory.plan import plan
from tools.submit.plan_text import describe


def nodes_of(places) -> list[int]:
    return sorted({place.node for place in places})


def roles_of(layout: Layout) -> list[str]:
    return [layout.roles(node) for node in range(layout.num_nodes)]


def num_ranks(dims: ParallelDims) -> int:
    return dims.tp * dims.pp * dims.cp * dims.dp


def test_the_rehearsal_has_trainers_on_the_first_two_nodes_and_one_engine_on_each_other():
    layout = plan_of("--nodes 4 --tp-size 2 --pp-size 2 --rollout.engines-per-node 1")
    assert layout.parallel == ParallelDims(tp=2, pp=2, cp=1, ep=1, dp=1)
    trainers = [(trainer.rank, trainer.node, trainer.slot) for trainer in layout.trainers]
    assert trainers == [(0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 1, 1)]
    engines = [(engine.index, engine.node, engine.slots) for engine in layout.engines]
    assert engines == [(0, 2, (0,)), (1, 3, (0,))]
    assert roles_of(layout) == ["trainer", "trainer", "engine", "engine"]
    assert nodes_of(layout.trainers) == [0, 1]
    assert nodes_of(layout.engines) == [2, 3]


def test_ranks_run_along_tp_then_cp_then_dp_then_pp():
    dims = ParallelDims(tp=2, pp=2, cp=2, ep=1, dp=2)
    order = []
    for rank in range(16):
        place = dims.coordinates(rank)
        order.append((place["pp"], place["dp"], place["cp"], place["tp"]))
    assert order == list(product(range(2), repeat=4))
    assert num_ranks(dims) == 16


@pytest.mark.parametrize(
    ("flags", "num_engines"),
    [
        ("", 8),
        ("--engine-tp-size 2", 4),
        ("--engine-tp-size 4", 2),
        ("--rollout.engines-per-node 3", 3),
    ],
)
def test_engines_fill_the_gpus_of_their_nodes(flags, num_engines):
    layout = plan_of(f"--nodes 2 {H200} --tp-size 2 {flags}", QWEN3_4B)
    assert len(layout.engines) == num_engines
    assert nodes_of(layout.engines) == [1]


@pytest.mark.parametrize(("nodes", "rollout_nodes"), [(2, 1), (3, 1), (4, 2), (5, 2)])
def test_half_of_the_nodes_rounded_down_hold_engines(nodes, rollout_nodes):
    layout = plan_of(f"--nodes {nodes}")
    assert len(nodes_of(layout.engines)) == rollout_nodes
    assert nodes_of(layout.trainers) == list(range(nodes - rollout_nodes))


def test_one_node_falls_back_to_fsdp_with_engines_on_half_of_its_gpus():
    layout = plan_of(f"--nodes 1 {H200}", QWEN3_4B)
    assert layout.backend == "fsdp"
    assert layout.parallel.dp == 4
    assert [trainer.slot for trainer in layout.trainers] == [0, 1, 2, 3]
    assert [engine.slots for engine in layout.engines] == [(4,), (5,), (6,), (7,)]
    assert layout.roles(0) == "trainer+engine"


def test_recorded_rollouts_leave_all_slots_to_trainers():
    config = config_of(f"--nodes 2 {H200} --tp-size 2 --load-rollouts runs/x")
    layout = plan(config, QWEN3_4B)
    assert layout.engines == ()
    assert layout.parallel.dp == 8
    assert roles_of(layout) == ["trainer", "trainer"]
    text = describe(config, QWEN3_4B, layout)
    assert "engines   none: recorded rollouts" in text
    assert "engine:" not in text
    one_slot = plan_of("--nodes 1 --cluster.slots-per-node 1 --load-rollouts runs/x")
    assert [trainer.slot for trainer in one_slot.trainers] == [0]
    three_ranks = plan_of("--nodes 1 --num-gpus 3 --load-rollouts runs/x")
    assert len(three_ranks.trainers) == 3


def test_rollout_only_leaves_all_slots_to_engines():
    # The trainer's TP of 3 fits nothing, and does not matter.
    config = config_of(f"--nodes 2 {H200} --tp-size 3 --engine-tp-size 2 --rollout-only")
    layout = plan(config, QWEN3_4B)
    assert layout.trainers == ()
    assert len(layout.engines) == 8
    assert nodes_of(layout.engines) == [0, 1]
    text = describe(config, QWEN3_4B, layout)
    assert "trainers  none" in text
    assert "memory    engine:" in text
    assert "trainer:" not in text
    assert Layout.from_json(layout.to_json()) == layout
    one_slot = plan_of("--nodes 1 --cluster.slots-per-node 1 --rollout-only")
    assert one_slot.engines[0].slots == (0,)
    assert plan_of("--nodes 1 --rollout-only --engine embedded").engines == ()


@pytest.mark.parametrize(
    ("flags", "trainer_slots", "engine_slots"),
    [
        (f"{H200} --engine-gpus 2", [0, 1, 2, 3, 4, 5], [6, 7]),
        (f"{H200} --num-gpus 3", [0, 1, 2], [3, 4, 5, 6, 7]),
        (f"{H200} --num-gpus 3 --engine-gpus 2", [0, 1, 2], [6, 7]),
        ("--num-gpus 4", [0, 1, 2, 3], [4]),
        ("--num-gpus 2 --engine embedded", [0, 1], []),
        ("--cluster.slots-per-node 1 --engine embedded", [0], []),
        (f"{H200} --engine embedded", [0, 1, 2, 3, 4, 5, 6, 7], []),
    ],
)
def test_one_node_is_shared_as_asked(flags, trainer_slots, engine_slots):
    layout = plan_of(flags, QWEN3_4B)
    assert [trainer.slot for trainer in layout.trainers] == trainer_slots
    assert [slot for engine in layout.engines for slot in engine.slots] == engine_slots


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        (f"--nodes 2 {H200} --tp-size 2", [[rank] for rank in range(16)]),
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
    layout = plan_of(f"{flags} --colocate", QWEN3_4B)
    assert [layout.ranks_at(engine) for engine in layout.engines] == ranks
    assert set(roles_of(layout)) == {"trainer+engine"}
    assert len(layout.trainers) == num_ranks(layout.parallel)
    ranks_per_engine = len(ranks[0])
    if ranks_per_engine > 1:
        assert len(layout.trainers) > len(layout.engines)


def test_the_embedded_engine_takes_no_node():
    layout = plan_of("--nodes 4 --engine embedded")
    assert nodes_of(layout.trainers) == [0, 1, 2, 3]
    assert layout.engines == ()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--nodes 4 --rollout-nodes 4", "cluster.rollout_nodes=4 of cluster.nodes=4: choose 1-3"),
        (
            "--nodes 1 --rollout-nodes 1",
            "rollout_nodes=1 of cluster.nodes=1: with one node engines share it",
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
        (
            "--nodes 4 --engine-gpus 2",
            "cluster.engine_gpus=2 with cluster.nodes=4: .* use cluster.rollout_nodes",
        ),
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
        ("--nodes 4 --num-gpus 3", "2 x 8 = 16 trainer ranks; leave it out"),
        (
            "--nodes 1 --cluster.gpus-per-node 1",
            "has no room for an engine of SGLang .* use --colocate or --engine embedded",
        ),
        (
            "--nodes 4 --rollout-batch-size 3 --n-samples-per-prompt 2",
            "gives 6 samples per optimizer step for DP=16; "
            "choose sizes with a product of at least 16",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_value_place_and_way_out(flags, says):
    with pytest.raises(RunError, match=says):
        plan_of(f"{H200} {flags}", QWEN3_4B)


def test_layers_without_experts_are_refused_where_sglang_would_take_them_for_sparse():
    mixed = CONFIGS["Qwen3-30B-A3B"] | {"mlp_only_layers": [0, 5]}
    shape = ModelShape.from_config(mixed)
    flags = f"--nodes 4 {H200} --ep-size 8 --allow-slow"
    says = "experts in all layers of a qwen3_moe, this one in 46; use --engine"
    with pytest.raises(RunError, match=says):
        plan_of(flags, shape)
    plan_of(f"{flags} --engine embedded", shape)


def many_configs():
    """(nodes, slots per node, configuration); most of them fit together, some do not."""
    base = config_of("--backend megatron")
    clusters = product((1, 2, 3, 4), (1, 2, 4), (None, 1, 2))
    trainers = product((1, 2), (1, 2))
    rollouts = product((1, 2), ("sglang", "embedded"))
    for sizes in product(clusters, trainers, rollouts):
        (nodes, slots, rollout_nodes), (tp, pp), (engine_tp, engine) = sizes
        yield replace(
            base,
            cluster=replace(
                base.cluster, nodes=nodes, slots_per_node=slots, rollout_nodes=rollout_nodes
            ),
            training=replace(base.training, tp_size=tp, pp_size=pp),
            rollout=replace(base.rollout, engine_tp_size=engine_tp, engine=engine),
        )


def test_every_accepted_plan_has_all_ranks_and_no_slot_twice():
    accepted = 0
    for config in many_configs():
        try:
            layout = plan(config, TINY)
        except RunError:
            continue
        accepted += 1
        check_places(config, layout)
        assert Layout.from_json(layout.to_json()) == layout
    assert accepted > 100


def check_places(config: RunConfig, layout: Layout) -> None:
    used = [(trainer.node, trainer.slot) for trainer in layout.trainers]
    used += [(engine.node, slot) for engine in layout.engines for slot in engine.slots]
    assert len(used) == len(set(used))
    for node, slot in used:
        assert 0 <= node < config.cluster.nodes
        assert 0 <= slot < config.cluster.slots_per_node
    ranks = [trainer.rank for trainer in layout.trainers]
    assert ranks == list(range(num_ranks(layout.parallel)))
    indices = [engine.index for engine in layout.engines]
    assert indices == list(range(len(indices)))
    assert bool(layout.engines) == (config.rollout.engine == "sglang")
    for trainer in layout.trainers:
        # A tensor-parallel group never leaves its node.
        tp_rank = layout.parallel.coordinates(trainer.rank)["tp"]
        first_of_group = layout.trainers[trainer.rank - tp_rank]
        assert first_of_group.node == trainer.node


@pytest.mark.parametrize(
    ("flags", "min_nodes"),
    [
        ("--nodes 4", 3),
        ("--nodes 5 --rollout-nodes 3", 3),
        ("--nodes 2", 2),
        ("--nodes 4 --engine embedded --rollout-nodes 0", 4),
        ("--nodes 4 --colocate", 4),
        ("--nodes 4 --rollout-only", 1),
        ("--nodes 1", 1),
    ],
)
def test_engine_nodes_but_one_may_be_missing(flags, min_nodes):
    layout = plan_of(flags)
    assert layout.min_nodes == min_nodes
    assert layout.on(layout.num_nodes) == layout
    smallest = layout.on(min_nodes)
    assert smallest.num_nodes == min_nodes
    assert smallest.trainers == layout.trainers
    assert smallest.engines == layout.engines[: len(smallest.engines)]
    assert bool(smallest.engines) == bool(layout.engines)
    assert all(engine.node < min_nodes for engine in smallest.engines)
