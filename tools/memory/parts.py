"""The parts of what a run holds in memory and on disk, in bytes."""

from dataclasses import dataclass

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerGPU:
    """What the fullest trainer GPU holds while it trains.

    Activations are those of the rank on which all parts together are largest.
    """

    weights: int
    # Float32, summed over micro-batches.
    gradients: int
    # Main parameters and two moments, or the rank's share of them.
    optimizer: int
    # FSDP: what is whole for a moment of the weights that it shards, and their gradients.
    gathered: int
    # What backward functions keep of micro-batches of `budget_tokens`.
    activations: int
    # The same where the micro-batches hold one sequence of `longest_tokens` each.
    longest_activations: int
    # Blocks of logits, and gradients of hidden states and of the output weight.
    logprobs: int
    # Buckets of a weight sync, which lie beside the states, but never beside activations.
    sync_buckets: int
    # CUDA's context, NCCL's buffers, and with cluster.colocate what a sleeping engine keeps.
    reserve: int
    # What is left for fragments of the allocator and for short-lived tensors.
    headroom: int
    # Tokens of a micro-batch on one rank: the budget, and the longest possible sequence.
    budget_tokens: int
    longest_tokens: int

    @property
    def states(self) -> int:
        """What it holds whatever the batch is."""
        return self.weights + self.gradients + self.optimizer + self.gathered

    @property
    def at_budget(self) -> int:
        return self.states + self.activations + self.logprobs + self.reserve

    @property
    def at_longest(self) -> int:
        return self.states + self.longest_activations + self.logprobs + self.reserve

    @property
    def total(self) -> int:
        """The most that it holds, with headroom."""
        in_sync = self.states + self.sync_buckets + self.reserve
        return max(self.at_budget, self.at_longest, in_sync) + self.headroom


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineGPU:
    """What an engine GPU holds of the share of its memory that the engine takes."""

    weights: int
    cache: int
    kv_bytes_per_token: int
    # Tokens of the longest possible sequence.
    longest_tokens: int

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values the engine holds at once."""
        return max(0, self.cache) // max(1, self.kv_bytes_per_token)

    @property
    def sequences(self) -> int:
        """Sequences of the longest length that it holds at once."""
        return self.cached_tokens // max(1, self.longest_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeMemory:
    """What the fullest node holds in its main memory."""

    # The reference's weights and room for the policy's, of all its trainers.
    reference: int
    # Weights and optimizer state of trainers that sleep while engines have their GPUs.
    sleeping: int
    # With training.optimizer_offload.
    offloaded: int
    # Rollouts in Ray's object store.
    rollouts: int
    # The embedded engine's weights, in the driver.
    embedded: int
    # Python, torch and CUDA of all processes.
    processes: int
    # cluster.memory_per_node; None: the site's default, which is not known.
    available: int | None

    @property
    def total(self) -> int:
        needs = (self.reference, self.sleeping, self.offloaded, self.rollouts, self.embedded)
        return sum(needs) + self.processes


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskNeed:
    """What a run writes at most, recorded rollouts aside."""

    checkpoint: int
    # Checkpoints that are kept at the end, and the one that is being written.
    checkpoints: int
    # The Hugging Face checkpoint at the end.
    export: int

    @property
    def total(self) -> int:
        return self.checkpoint * self.checkpoints + self.export


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on the fullest GPU of each kind, on the fullest node and on disk.

    A kind that the run does not have is None.
    """

    trainer: TrainerGPU | None
    engine: EngineGPU | None
    node: NodeMemory
    disk: DiskNeed


def size_text(num_bytes: int) -> str:
    if num_bytes < GIB // 10:
        return f"{num_bytes / MIB:.1f} MiB"
    return f"{num_bytes / GIB:.1f} GiB"
