"""Every rung is a run that can be planned on the clusters that have it."""

import pytest

from nanoslime.config.cluster import ClusterConfig
from tools.acceptance import rungs
from tools.submit import grpo as submit_grpo


def planned(num_gpus: int, *given: str) -> dict[str, tuple]:
    """By rung what its plan has: nodes, backend, trainers, engines; None where it is impossible."""
    command, _ = submit_grpo.parse([])
    rungs.take_tiny_model(command, given)
    found = {}
    for rung in rungs.ladder(ClusterConfig(gpus_per_node=num_gpus)):
        flags = rungs.flags(rung, [f"--cluster.gpus-per-node={num_gpus}", *given])
        config = submit_grpo.configure(command, flags)
        if rung.impossible:
            found[rung.name] = None
            continue
        submit_grpo.check_target(config, submits=True)
        _, layout, _ = submit_grpo.plan(config, {}, None, download=False)
        sizes = (layout.num_nodes, layout.backend, len(layout.trainers), len(layout.engines))
        found[rung.name] = sizes
        assert config.cluster.time_limit_min == 10
        assert config.cluster.measure_links
    return found


def test_a_cluster_without_gpus_has_all_rungs():
    assert planned(0) == {
        "one-slot": (1, "fsdp", 1, 0),
        "node-fsdp": (1, "fsdp", 1, 1),
        "node-megatron": (1, "megatron", 4, 1),
        "node-colocated": (1, "fsdp", 1, 1),
        "two-nodes": (2, "megatron", 2, 1),
        "four-nodes": (4, "megatron", 4, 2),
    }


@pytest.mark.parametrize(
    ("num_gpus", "wanted"),
    [
        (
            8,
            {
                "one-gpu": (1, "fsdp", 1, 1),
                "node-fsdp": (1, "fsdp", 4, 4),
                "node-megatron": (1, "megatron", 4, 4),
                "node-colocated": (1, "fsdp", 8, 8),
                "two-nodes": (2, "megatron", 8, 8),
                "four-nodes": (4, "megatron", 16, 16),
            },
        ),
        (
            4,
            {
                "one-gpu": (1, "fsdp", 1, 1),
                "node-fsdp": (1, "fsdp", 2, 2),
                "node-megatron": (1, "megatron", 4, 4),
                "node-colocated": (1, "fsdp", 4, 4),
                "two-nodes": (2, "megatron", 4, 4),
                "four-nodes": (4, "megatron", 8, 8),
            },
        ),
        (
            1,
            {
                "one-gpu": (1, "fsdp", 1, 1),
                "node-fsdp": None,
                "node-megatron": None,
                "node-colocated": None,
                "two-nodes": (2, "megatron", 1, 1),
                "four-nodes": (4, "megatron", 2, 2),
            },
        ),
    ],
)
def test_a_node_with_gpus_has_the_rungs_that_fit_on_it(num_gpus, wanted):
    assert planned(num_gpus) == wanted


def test_flags_hold_for_all_rungs_but_their_layout_stays():
    rung = rungs.ladder(ClusterConfig())[-1]
    given = ["--num-rollout", "5", "--nodes", "1", "--rollout.stop", "a", "b", "--no-use-kl-loss"]
    words = rungs.flags(rung, given)
    assert "--rollout.num-rollout=5" in words and "--cluster.nodes=4" in words
    assert "--algorithm.use-kl-loss=false" in words
    place = words.index("--rollout.stop")
    assert words[place + 1 : place + 3] == ["a", "b"]


def test_a_tiny_model_is_taken_where_none_is_named():
    command, _ = submit_grpo.parse([])
    rungs.take_tiny_model(command, ["--hf-checkpoint", "Qwen/Qwen3-4B"])
    assert command.recipe is None
    rungs.take_tiny_model(command, ["--lr", "1e-5"])
    assert command.recipe == submit_grpo.RECIPES / "rehearsal.yaml"
