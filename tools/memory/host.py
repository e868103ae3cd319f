"""Main memory of a node, and the disk: what trainers, engines and checkpoints need of them."""

import re

from nanoslime.config import RunConfig
from nanoslime.engine_kind import takes_slots
from nanoslime.models.parallel_sizes import ParallelDims
from nanoslime.models.shape import ModelShape
from tools.memory.parts import GIB, DiskNeed, NodeMemory
from tools.memory.states import States, checkpoint_bytes, width_of

# Main memory of processes, without tensors: measured on a CPU are 1.0 GB for a trainer, 2.8 GB
# for SGLang's three processes of an engine and 1.8 GB for driver, rollout worker and Ray
# (tests/RESULTS.md, two hours of disturbance). On a GPU a process has libraries of CUDA too,
# for which there is one more GiB; that was not measured.
_TRAINER_PROCESS = 2 * GIB
_ENGINE_PROCESSES = 4 * GIB
_NODE_PROCESSES = 2 * GIB
# A token's id, mask and logprob in a rollout's arrays.
_BYTES_OF_TOKEN = 9
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SLURM_MEMORY = re.compile(r"(\d+)([KMGT]?)B?", re.IGNORECASE)


def node_memory(
    config: RunConfig, shape: ModelShape, parallel: ParallelDims, states: States
) -> NodeMemory:
    """What the fullest node holds in main memory.

    Where the algorithm needs a reference, each trainer has its weights and room for the policy's
    on the host. With cluster.colocate a sleeping trainer's weights and optimizer state are there
    in pinned memory; its gradients are made anew (training/sleep.py).
    """
    cluster = config.cluster
    ranks = parallel.tp * parallel.pp * parallel.cp * parallel.dp
    trainers = 0 if config.rollout.rollout_only else min(ranks, cluster.slots)
    has_engines = takes_slots(config.rollout)
    engines = 0
    if has_engines and (cluster.colocate or cluster.nodes == 1):
        engines = max(1, cluster.slots // config.rollout.engine_tp_size)
    reference = 2 * states.own_weights if config.algorithm.needs_reference else 0
    sleeping = states.weights + states.optimizer if cluster.colocate else 0
    embedded = 0
    if not has_engines and not config.rollout.load_rollouts:
        embedded = width_of(config) * shape.num_parameters
    return NodeMemory(
        reference=reference * trainers,
        sleeping=sleeping * trainers,
        offloaded=states.offloaded * trainers,
        rollouts=rollout_bytes(config, shape),
        embedded=embedded,
        processes=trainers * _TRAINER_PROCESS + engines * _ENGINE_PROCESSES + _NODE_PROCESSES,
        available=slurm_bytes(cluster.memory_per_node),
    )


def rollout_bytes(config: RunConfig, shape: ModelShape) -> int:
    """Arrays of the samples of a rollout at their longest, which the object stores of the nodes
    hold once; with routed experts, one or two bytes for each."""
    rollout = config.rollout
    samples = rollout.rollout_batch_size * rollout.n_samples_per_prompt
    of_token = _BYTES_OF_TOKEN
    if shape.moe and config.training.routing_replay == "R3":
        expert_bytes = 1 if shape.moe.num_experts <= 256 else 2
        of_token += expert_bytes * len(shape.moe_layers) * shape.moe.num_experts_per_token
    return samples * longest_sequence(config, shape) * of_token


def longest_sequence(config: RunConfig, shape: ModelShape) -> int:
    """Tokens of the longest prompt and response together that can be trained on."""
    asked = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    return min(asked, shape.context_length)


def longest_answer(config: RunConfig) -> tuple[str, int]:
    """The field that says how long answers of an engine get, and its tokens: evaluations may ask
    for longer ones than training."""
    lengths = {"rollout.max_new_tokens": config.rollout.max_new_tokens}
    for number, one in enumerate(config.eval.sets):
        lengths[f"eval.sets.{number}.max_new_tokens"] = one.max_new_tokens or 0
    return max(lengths.items(), key=lambda field_and_tokens: field_and_tokens[1])


def slurm_bytes(text: str) -> int | None:
    """Bytes of what sbatch --mem takes: a number in MiB, or with K, M, G or T after it.

    None where it says nothing, for 0, which is all of the node's, and for another text.
    """
    found = _SLURM_MEMORY.fullmatch(text.strip())
    if not found or not int(found[1]):
        return None
    return int(found[1]) * _UNITS[found[2].upper() or "M"]


def disk_need(config: RunConfig, shape: ModelShape) -> DiskNeed:
    """The most that checkpoints and the export take: a checkpoint is complete before an older
    one is removed."""
    keep = config.checkpoint
    kept = keep.keep_last + 1 + int(keep.keep_best)
    steps = config.rollout.num_rollout
    if keep.keep_every and keep.interval:
        kept += steps // keep.keep_every
    if keep.interval == 0 and keep.every_min == 0:
        kept = 1
    if config.rollout.rollout_only:
        return DiskNeed(checkpoint=0, checkpoints=0, export=0)
    export = width_of(config) * shape.num_parameters if keep.export_hf else 0
    return DiskNeed(
        checkpoint=checkpoint_bytes(config, shape), checkpoints=min(kept, steps), export=export
    )
