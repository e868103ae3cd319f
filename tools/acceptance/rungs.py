"""The rungs: from one device to four nodes, as settings of the runs that they are.

one device -> one node: FSDP2, Megatron TP 2 x PP 2, colocated -> two nodes -> four nodes
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nanoslime.config.cluster import ClusterConfig
from nanoslime.config.flags import parse
from tools.submit.grpo import RECIPES

# A job of a rung ends after so many minutes, whatever it does.
TIME_LIMIT_MIN = 10
NUM_ROLLOUTS = 3
# Cores that a CPU node has at least, where the cluster file does not say.
_FEW_CORES = 2
_FSDP = {"training.backend": "fsdp", "training.tp_size": 1, "training.pp_size": 1}
_FOUR_WAYS = {"training.backend": "megatron", "training.tp_size": 2, "training.pp_size": 2}
# Every rung saves after every step and sends all weights twice.
_COMMON = {
    "rollout.num_rollout": NUM_ROLLOUTS,
    "rollout.rollout_batch_size": 8,
    "rollout.n_samples_per_prompt": 4,
    "rollout.max_new_tokens": 8,
    "eval.max_prompts": 16,
    "eval.n_samples_per_prompt": 1,
    "checkpoint.interval": 1,
    "checkpoint.export_hf": False,
    "weight_sync.compare_every": 1,
    "rehearsal.target_reward": 0.1,
    "training.lr_warmup_steps": 0,
    "cluster.time_limit_min": TIME_LIMIT_MIN,
    "cluster.signal_lead_s": 60,
    "cluster.max_requeues": 2,
    # Of a job with one node it does nothing.
    "cluster.measure_links": True,
}


@dataclass(frozen=True, slots=True)
class Rung:
    name: str
    title: str
    num_nodes: int
    # Settings by field, beside those of all rungs.
    settings: Mapping[str, object]
    # Why the cluster has no such rung; empty where it has.
    impossible: str = ""


def ladder(cluster: ClusterConfig) -> list[Rung]:
    """The rungs of a cluster, the lowest first."""
    num_gpus = cluster.gpus_per_node
    rungs = _on_gpus(num_gpus) if num_gpus else _on_cpus(cluster)
    # A tensor-parallel group lies in one node.
    tp_size = 1 if num_gpus == 1 else 2
    engines = {"rollout.engines_per_node": "none" if num_gpus else 1}
    common = {"training.backend": "megatron", "training.tp_size": tp_size, **engines}
    rungs.append(
        Rung(
            "two-nodes",
            f"two nodes: Megatron TP {tp_size} on the first, engines on the second",
            2,
            {**common, "training.pp_size": 1, "cluster.rollout_nodes": 1},
        )
    )
    rungs.append(
        Rung(
            "four-nodes",
            f"four nodes: Megatron TP {tp_size} x PP 2 on two, engines on the others",
            4,
            {**common, "training.pp_size": 2, "cluster.rollout_nodes": 2},
        )
    )
    return rungs


def _on_gpus(num_gpus: int) -> list[Rung]:
    """Those of a device and of a node with so many GPUs."""
    fsdp = {**_FSDP, "rollout.engines_per_node": "none"}
    four_ways = {**_FOUR_WAYS, "rollout.engines_per_node": "none"}
    few = f"a node has {num_gpus} GPU(s)"
    shares = {"cluster.engine_gpus": num_gpus // 2} if num_gpus >= 8 else {"cluster.colocate": True}
    one = {**fsdp, "cluster.gpus_per_node": 1, "cluster.colocate": True}
    divided = {**fsdp, "cluster.engine_gpus": max(1, num_gpus // 2)}
    colocated = {**fsdp, "cluster.colocate": True}
    return [
        Rung("one-gpu", "one GPU, which trainer and engine share", 1, one),
        Rung("node-fsdp", "one node: FSDP2", 1, divided, few if num_gpus < 2 else ""),
        Rung(
            "node-megatron",
            "one node: Megatron TP 2 x PP 2",
            1,
            {**four_ways, **shares},
            few if num_gpus < 4 else "",
        ),
        Rung("node-colocated", "one node: colocated", 1, colocated, few if num_gpus < 2 else ""),
    ]


def _on_cpus(cluster: ClusterConfig) -> list[Rung]:
    """Those of a slot and of a node without GPUs; slots are shares of its cores."""
    fsdp = {
        **_FSDP,
        "cluster.cpus_per_node": cluster.cpus_per_node or 1,
        "rollout.engines_per_node": 1,
    }
    cores = cluster.cpus_per_node or _FEW_CORES
    embedded = {**fsdp, "cluster.slots_per_node": 1, "rollout.engine": "embedded"}
    divided = {
        **fsdp,
        "cluster.slots_per_node": 2,
        "cluster.engine_gpus": 1,
        "cluster.cpus_per_node": cores,
    }
    megatron = {
        **_FOUR_WAYS,
        "rollout.engines_per_node": 1,
        "cluster.slots_per_node": 6,
        "cluster.engine_gpus": 2,
        "cluster.cpus_per_node": cores,
    }
    colocated = {**fsdp, "cluster.slots_per_node": 1, "cluster.colocate": True}
    return [
        Rung("one-slot", "one CPU slot, with the engine in the driver", 1, embedded),
        Rung("node-fsdp", "one node: FSDP2", 1, divided),
        Rung("node-megatron", "one node: Megatron TP 2 x PP 2", 1, megatron),
        Rung("node-colocated", "one node: colocated", 1, colocated),
    ]


def flags(rung: Rung, given: Sequence[str]) -> list[str]:
    """The flags of a rung's run: its own, and those that were given for what it leaves open."""
    own = {**rung.settings, "cluster.nodes": rung.num_nodes}
    settings: dict[str, object] = dict(_COMMON)
    settings |= {flag.field: flag.value for flag in parse(given)} | own
    words = []
    for field, value in settings.items():
        name = f"--{field.replace('_', '-')}"
        if isinstance(value, list):
            words += [name, *map(str, value)]
        else:
            words.append(f"{name}={_text(value)}")
    return words


def take_tiny_model(command: argparse.Namespace, given: Sequence[str]) -> None:
    """Takes the rehearsal's recipe where neither a recipe nor a flag names a model."""
    names_model = any(flag.field == "model.hf_checkpoint" for flag in parse(given))
    if command.recipe is None and not names_model:
        command.recipe = RECIPES / "rehearsal.yaml"


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return json.dumps(value)
    return "none" if value is None else str(value)
