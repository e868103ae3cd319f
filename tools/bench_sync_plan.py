"""Counts what a weight sync of real model shapes takes, and times its planning.

    python tools/bench_sync_plan.py [--layouts 30B-16 ...] [--ways broadcast ...]

No weights are made: the plan of a sync is arithmetic on the model's config.json and the
layout, and every rank makes it. The tables show

    planning   seconds of a core on every rank, once in its life: what all ranks hold, the
               plan, and the rank's own routes; and the memory that the plans of all ways keep
    counts     what one sync sends, and by how many calls of each engine
    loads      what single senders (or writers) deliver, the bytes through the network of the
               busiest rank, and the extra memory of the rank that needs most: flat buckets,
               and what arrives or leaves beside them; two buckets are the bound
    files      what the ranks write for disk, and exchange before that

A message goes from one trainer rank to another. "before" is a sync in which rank 0 receives
every shard by a message of its own and broadcasts every tensor by itself.
"""

import resource
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nanoslime.batch import OwnedShard
from nanoslime.config.rollout import WeightSyncConfig
from nanoslime.config.training import TrainingConfig
from nanoslime.models.rules import tensors, whole
from nanoslime.models.shape import ModelShape
from nanoslime.models.trainable import check_parallel
from nanoslime.sealed_bucket import HEADER_BYTES
from nanoslime.storage.safetensors_file import plan_files
from nanoslime.training.megatron.weights import owned_shards
from nanoslime.weight_sync.broadcast import NUM_FLAT, SHARE, runs_of
from nanoslime.weight_sync.disk import MAX_SHARD_BYTES
from nanoslime.weight_sync.exchange import Exchange
from nanoslime.weight_sync.plan import (
    Bucket,
    Source,
    Target,
    Targets,
    make_sync_plan,
    overlap,
    rows_on_each,
    size,
    whole_on_first,
)

MB = 1e6
GB = 1e9
SLOTS = 8  # of a node
BUCKET_BYTES = WeightSyncConfig().bucket_bytes

QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
}
QWEN3 = {
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
}
# What config.json of the published checkpoints says.
MODELS = {
    "Qwen3-30B-A3B": QWEN3_MOE
    | {
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
    },
    "Qwen3-235B-A22B": QWEN3_MOE
    | {
        "hidden_size": 4096,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
    },
    "Qwen3-32B": QWEN3
    | {
        "hidden_size": 5120,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "intermediate_size": 25600,
    },
}


@dataclass(frozen=True)
class Layout:
    """Trainer ranks of Megatron, or of FSDP, which cuts rows alone."""

    model: str
    ranks: int
    tp: int = 1
    pp: int = 1
    ep: int = 1
    backend: str = "megatron"

    @property
    def title(self) -> str:
        cuts = f"TP{self.tp} PP{self.pp} EP{self.ep}" if self.backend == "megatron" else "FSDP2"
        return f"{self.model}, {cuts}, {self.ranks} ranks"

    def owned(self, shape: ModelShape) -> list[list[OwnedShard]]:
        """What every rank holds, as its backend says it. Raises RunError for a layout that
        the backend refuses.
        """
        training = TrainingConfig(
            backend=self.backend,
            tp_size=self.tp,
            pp_size=self.pp,
            ep_size=self.ep,
            sequence_parallel=self.tp > 1,
        )
        check_parallel(training, shape, self.ranks, SLOTS)
        if self.backend == "megatron":
            return owned_shards(shape, training, self.ranks)
        return [self._rows_of(rank, shape) for rank in range(self.ranks)]

    def _rows_of(self, rank: int, shape: ModelShape) -> list[OwnedShard]:
        """As torch.chunk cuts, see training/fsdp_model.py."""
        found = []
        for name, full_shape in tensors(shape).items():
            each = -(-full_shape[0] // self.ranks)
            start = min(rank * each, full_shape[0])
            rows = slice(start, min(start + each, full_shape[0]))
            if rows.start < rows.stop:
                found.append(OwnedShard(name, full_shape, (rows, *whole(full_shape[1:]))))
        return found


LAYOUTS = {
    "30B-16": Layout("Qwen3-30B-A3B", 16, tp=4, ep=8),
    "30B-32": Layout("Qwen3-30B-A3B", 32, tp=4, ep=8),
    "30B-pp-16": Layout("Qwen3-30B-A3B", 16, tp=2, pp=2, ep=4),
    "30B-pp-32": Layout("Qwen3-30B-A3B", 32, tp=2, pp=2, ep=4),
    "235B-64": Layout("Qwen3-235B-A22B", 64, tp=4, pp=4, ep=8),
    "235B-512": Layout("Qwen3-235B-A22B", 512, tp=4, pp=4, ep=8),
    "32B-8": Layout("Qwen3-32B", 8, backend="fsdp"),
    "32B-64": Layout("Qwen3-32B", 64, backend="fsdp"),
}


@dataclass(frozen=True)
class Way:
    """How a transport plans: weight_sync/broadcast.py, disk.py and colocated.py."""

    targets_of: Targets
    bucket_bytes: int
    num_flat: int  # buckets that a sender holds
    spreads: bool = False


WAYS = {
    "broadcast": Way(whole_on_first, int(BUCKET_BYTES * SHARE), NUM_FLAT),
    "tensor": Way(whole_on_first, BUCKET_BYTES, 1),
    "disk": Way(rows_on_each, BUCKET_BYTES, 0, spreads=True),
}


@dataclass
class Counts:
    """What a sync takes; bytes by rank."""

    num_messages: int = 0
    num_parts: int = 0  # of messages: one for each shard that travels
    received: Counter[int] = field(default_factory=Counter)
    sent: Counter[int] = field(default_factory=Counter)
    # What is there beside flat buckets while one bucket is filled.
    passing: Counter[int] = field(default_factory=Counter)
    # What a rank broadcasts or writes.
    delivered: Counter[int] = field(default_factory=Counter)
    largest: Counter[int] = field(default_factory=Counter)

    @property
    def gathered_gb(self) -> float:
        return sum(self.received.values()) / GB

    @property
    def delivered_gb(self) -> str:
        """The least and the most, of ranks that deliver anything."""
        return f"{min(self.delivered.values()) / GB:.2f} to {max(self.delivered.values()) / GB:.2f}"

    @classmethod
    def of(cls, plan: Sequence[Bucket]) -> "Counts":
        counts = cls()
        for bucket in plan:
            counts.add(bucket)
        return counts

    def add(self, bucket: Bucket) -> None:
        pairs: Counter[tuple[int, int]] = Counter()
        kept: Counter[int] = Counter()
        for tensor in bucket.tensors:
            for target in tensor.targets:
                kept[target.rank] += size(target.box) * tensor.dtype.itemsize
                for source in tensor.sources:
                    shared = overlap(source.box, target.box)
                    if shared is None or source.rank == target.rank:
                        continue
                    self.num_parts += 1
                    num_bytes = size(shared) * tensor.dtype.itemsize
                    pairs[source.rank, target.rank] += num_bytes
        self.num_messages += len(pairs)
        passing: Counter[int] = Counter()
        for (source_rank, target_rank), num_bytes in pairs.items():
            self.sent[source_rank] += num_bytes
            self.received[target_rank] += num_bytes
            passing[source_rank] += num_bytes
            passing[target_rank] += num_bytes
        for counter, found in ((self.passing, passing), (self.largest, kept)):
            for rank, num_bytes in found.items():
                counter[rank] = max(counter[rank], num_bytes)
        self.delivered.update(kept)


@dataclass(frozen=True)
class Planned:
    """The plan of one way for one layout, and what it took to make it."""

    layout: Layout
    name: str
    plan: tuple[Bucket, ...]
    counts: Counts
    model_bytes: int
    plan_s: float
    routes_s: float

    @property
    def way(self) -> Way:
        return WAYS[self.name]

    @property
    def wire_bytes(self) -> int:
        """What each engine rank gets by broadcasts, or by handles."""
        return sum(HEADER_BYTES + bucket.nbytes for bucket in self.plan)

    def bytes_through(self, rank: int) -> int:
        """All that a rank's network has to carry, or writes."""
        counts = self.counts
        moved = counts.received[rank] + counts.sent[rank]
        if self.name == "tensor":
            return moved + self.model_bytes  # every rank gets, or sends, every bucket
        return moved + counts.delivered[rank]

    def extra_bytes(self, rank: int) -> int:
        """Most memory that a rank takes for it."""
        counts = self.counts
        kept = counts.largest[rank]
        if self.name == "tensor":
            kept = max(counts.largest.values())
        return max(1, self.way.num_flat) * kept + counts.passing[rank]

    def most(self, of_rank: Callable[[int], int]) -> int:
        return max(of_rank(rank) for rank in range(self.layout.ranks))


def make(layout: Layout, names: Sequence[str]) -> tuple[list[Planned], float]:
    """The plans of these ways, and the seconds for what all ranks hold."""
    shape = ModelShape.from_config(MODELS[layout.model])
    model_bytes = 2 * shape.num_parameters
    begin = time.process_time()
    owned = layout.owned(shape)
    owned_s = time.process_time() - begin
    found = []
    for name in names:
        way = WAYS[name]
        begin = time.process_time()
        plan = make_sync_plan(
            owned, _bfloat16, way.bucket_bytes, way.targets_of, spreads=way.spreads
        )
        plan_s = time.process_time() - begin
        begin = time.process_time()
        Exchange(plan, 0, torch.device("cpu"))
        routes_s = time.process_time() - begin
        counts = Counts.of(plan)
        found.append(Planned(layout, name, plan, counts, model_bytes, plan_s, routes_s))
    return found, owned_s


def _bfloat16(name: str) -> torch.dtype:
    return torch.bfloat16


def print_row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def whole_on_rank_0(shape: tuple[int, ...], sources: Sequence[Source]) -> list[Target]:
    """The whole tensor, on rank 0."""
    return [Target(0, whole(shape))]


def print_before(layout: Layout) -> None:
    """A sync through rank 0, shard by shard and tensor by tensor."""
    shape = ModelShape.from_config(MODELS[layout.model])
    plan = make_sync_plan(layout.owned(shape), _bfloat16, sys.maxsize, whole_on_rank_0)
    counts = Counts.of(plan)
    gathered = f"{counts.gathered_gb:.1f}"
    num_tensors = f"{len(tensors(shape)):,}"
    num_messages = f"{counts.num_parts:,}"
    amounts = (num_messages, gathered, num_tensors, num_tensors, "1.00")
    print_row(layout.title, "before", "-", 1, *amounts)


def print_counts(planned: Planned) -> None:
    counts = planned.counts
    num_buckets = f"{len(planned.plan):,}"
    senders = [bucket.first_rank for bucket in planned.plan]
    num_calls = len(list(runs_of(senders))) if planned.name == "broadcast" else len(senders)
    wire = f"{planned.wire_bytes / planned.model_bytes:.2f}"
    gathered = (f"{counts.num_messages:,}", f"{counts.gathered_gb:.1f}")
    amounts = (num_buckets, len(set(senders)), *gathered, num_buckets, f"{num_calls:,}", wire)
    print_row(planned.layout.title, planned.name, *amounts)


def print_loads(planned: Planned) -> None:
    most = f"{planned.most(planned.bytes_through) / GB:.1f}"
    extra = planned.most(planned.extra_bytes)
    memory = (f"{extra / MB:,.0f}", f"{extra / (2 * BUCKET_BYTES):.2f}")
    print_row(planned.layout.title, planned.name, planned.counts.delivered_gb, most, *memory)


def print_files(planned: Planned) -> None:
    """How many files a checkpoint has, and how many of them a rank writes to."""
    layout = planned.layout
    shapes = {tensor.name: tensor.shape for bucket in planned.plan for tensor in bucket.tensors}
    specs = [(name, "BF16", shapes[name]) for name in sorted(shapes)]
    heads, index = plan_files(specs, MAX_SHARD_BYTES)
    assert index is not None
    files_of: dict[int, set[str]] = {}
    for bucket in planned.plan:
        for tensor in bucket.tensors:
            for target in tensor.targets:
                files_of.setdefault(target.rank, set()).add(index["weight_map"][tensor.name])
    num_files = [len(files) for files in files_of.values()]
    counts = planned.counts
    written = (f"{len(files_of)} of {layout.ranks}", counts.delivered_gb)
    spread = f"{min(num_files)} to {max(num_files)}"
    exchanged = (f"{counts.num_messages:,}", f"{counts.gathered_gb:.1f}")
    print_row(layout.title, len(heads), *written, spread, *exchanged)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def table(headings: str) -> None:
    print(f"\n| {headings} |")
    print("|---" * len(headings.split(" | ")) + "|")


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    options = parser.parse_args(argv)
    made: list[Planned] = []
    print(f"buckets of {BUCKET_BYTES / MB:.0f} MB")
    table("layout | all shards: s | way | plan s | routes s | kept MB")
    for name in options.layouts:
        before = resident_bytes()
        of_layout, owned_s = make(LAYOUTS[name], options.ways)
        grown = (resident_bytes() - before) / MB
        made += of_layout
        for planned in of_layout:
            cells = f"{owned_s:.1f} | {planned.name} | {planned.plan_s:.1f}"
            row = f"{planned.layout.title} | {cells} | {planned.routes_s:.2f} | {grown:.0f}"
            print(f"| {row} |", flush=True)
    table(
        "layout | way | buckets | senders | messages | gathered GB | broadcasts | calls "
        "| wire / model"
    )
    for name in options.layouts:
        print_before(LAYOUTS[name])
        for planned in made:
            if planned.layout == LAYOUTS[name] and planned.name != "disk":
                print_counts(planned)
    table("layout | way | a sender's GB | busiest rank GB | extra MB | of two buckets")
    for planned in made:
        print_loads(planned)
    table("layout | files | ranks that write | GB each | files each | messages | exchanged GB")
    for planned in made:
        if planned.name == "disk":
            print_files(planned)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
