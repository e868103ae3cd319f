"""Packing and balance of sequences beside first-fit-decreasing and Karmarkar-Karp.

    python tools/bench_packing.py [--gsm8k DIR] [--seeds 20]

The table shows per packing: its fill, which is tokens over (micro-batches x budget), the
most that any packing with equally many micro-batches per rank can have, the slowest
rank's cost over the mean, and the time. The traces: prompts and answers of GSM8K at four
characters to a token, each once and eight times, and log-normal lengths, exp(Normal(ln
median, 1)), cut at the budget.
"""

import heapq
import json
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np

from nanoslime.training.packing import pack, sequence_costs

NUM_RANKS = 8
BUDGET = 16_384  # tokens of a micro-batch
PARITY_TOKENS = 24_576.0
GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k"
Packing = list[list[list[int]]]  # [rank][micro-batch]: sequences
Packer = Callable[[list[int]], Packing]


def long_tail(seed: int, median: float, number: int) -> list[int]:
    """Log-normal lengths, cut at the budget."""
    lengths = np.random.default_rng(seed).lognormal(np.log(median), 1.0, number)
    return lengths.clip(1, BUDGET).astype(int).tolist()


def gsm8k(directory: Path, number: int) -> tuple[str, list[int]]:
    """The name of the trace and its lengths; without the data, lengths of a formula near
    them.
    """
    file = directory / "train.jsonl"
    if not file.exists():
        print(f"{file} does not exist: lengths are exp(Normal(ln 124, 0.42)), near those of GSM8K")
        lengths = np.random.default_rng(0).lognormal(np.log(124), 0.42, number)
        return "GSM8K, by formula", lengths.astype(int).tolist()
    found = []
    for line in file.read_text().splitlines()[:number]:
        row = json.loads(line)
        found.append(len(row["question"] + row["answer"]) // 4 + 1)
    return "GSM8K", found


def nanoslime(lengths: list[int]) -> Packing:
    return pack(lengths, num_ranks=NUM_RANKS, max_tokens=BUDGET, parity_tokens=PARITY_TOKENS)


def first_fit(lengths: list[int]) -> Packing:
    """First-fit-decreasing micro-batches, dealt to the ranks in turn."""
    bins = first_fit_decreasing(range(len(lengths)), lengths)
    return [bins[rank::NUM_RANKS] for rank in range(NUM_RANKS)]


def karmarkar_karp(lengths: list[int]) -> Packing:
    """Sequences to ranks by the largest differencing method, then first-fit-decreasing on
    each rank.

    A division is one share for each rank, the lightest first; a share is (cost,
    sequences). The two most uneven divisions become one, the lightest share of one with
    the heaviest of the other, until a single division is left.
    """
    heap: list[tuple[float, int, list[tuple[float, list[int]]]]] = []
    for sequence, cost in enumerate(sequence_costs(lengths, PARITY_TOKENS)):
        nothing: tuple[float, list[int]] = (0.0, [])
        division = [nothing] * (NUM_RANKS - 1) + [(cost, [sequence])]
        heap.append((-cost, sequence, division))
    heapq.heapify(heap)
    while len(heap) > 1:
        _, order, one = heapq.heappop(heap)
        _, _, other = heapq.heappop(heap)
        merged = []
        for (light_cost, light), (heavy_cost, heavy) in zip(one, reversed(other), strict=True):
            merged.append((light_cost + heavy_cost, light + heavy))
        merged.sort(key=itemgetter(0))
        lightest_cost, _ = merged[0]
        heaviest_cost, _ = merged[-1]
        heapq.heappush(heap, (lightest_cost - heaviest_cost, order, merged))
    _, _, division = heap[0]
    return [first_fit_decreasing(sequences, lengths) for _, sequences in division]


def first_fit_decreasing(sequences: Iterable[int], lengths: list[int]) -> list[list[int]]:
    """Micro-batches of at most BUDGET tokens: the longest sequence first, each where it
    first fits.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for sequence in sorted(sequences, key=lambda sequence: -lengths[sequence]):
        length = lengths[sequence]
        number = _first_with_room(room, length)
        if number is None:
            number = len(bins)
            bins.append([])
            room.append(BUDGET)
        bins[number].append(sequence)
        room[number] -= length
    return bins


def _first_with_room(room: list[int], length: int) -> int | None:
    for number, left in enumerate(room):
        if left >= length:
            return number
    return None


@dataclass(frozen=True, slots=True)
class Quality:
    """A packing's fill, the most that it can be, the slowest rank's cost over the mean,
    seconds.
    """

    fill: float
    most_possible: float
    slowest_over_mean: float
    seconds: float


def measure(packer: Packer, lengths: list[int]) -> Quality:
    """The quality of a packing; all ranks run as many micro-batches as the one with the
    most.
    """
    started = time.perf_counter()
    packing = packer(lengths)
    seconds = time.perf_counter() - started
    packed = [i for rank in packing for micro_batch in rank for i in micro_batch]
    assert sorted(packed) == list(range(len(lengths)))
    num_tokens = sum(lengths)
    num_micro_batches = NUM_RANKS * max(len(rank) for rank in packing)
    least_per_rank = -(-num_tokens // (NUM_RANKS * BUDGET))
    costs = sequence_costs(lengths, PARITY_TOKENS)
    loads = []
    for rank in packing:
        loads.append(sum(costs[i] for micro_batch in rank for i in micro_batch))
    return Quality(
        fill=num_tokens / (num_micro_batches * BUDGET),
        most_possible=num_tokens / (NUM_RANKS * least_per_rank * BUDGET),
        slowest_over_mean=max(loads) * NUM_RANKS / sum(loads),
        seconds=seconds,
    )


def make_traces(gsm8k_dir: Path, num_seeds: int, median: float) -> dict[str, list[list[int]]]:
    """Name -> the lengths of every case of a trace."""
    name, lengths = gsm8k(gsm8k_dir, 7473)
    traces = {
        f"{name}, {len(lengths)}": [lengths],
        f"{name}, {len(lengths)} x 8": [lengths * 8],
    }
    for number, trace_median in ((512, median), (512, 2048.0), (8192, 2048.0)):
        kind = f"log-normal, median {trace_median:g}, {number}"
        traces[f"{kind}, seed 0"] = [long_tail(0, trace_median, number)]
        if number == 512 and num_seeds > 1:
            cases = [long_tail(seed, trace_median, number) for seed in range(num_seeds)]
            traces[f"{kind}, worst of {num_seeds} seeds"] = cases
    return traces


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gsm8k", type=Path, default=GSM8K, help="directory with train.jsonl (%(default)s)"
    )
    parser.add_argument(
        "--seeds", type=int, default=20, help="long-tail traces of each kind (%(default)s)"
    )
    parser.add_argument(
        "--median", type=float, default=4096, help="of the long tail, in tokens (%(default)s)"
    )
    arguments = parser.parse_args(argv)
    traces = make_traces(arguments.gsm8k, arguments.seeds, arguments.median)
    print(f"DP {NUM_RANKS}, budget {BUDGET}\n")
    print("| trace | packing | fill | most possible | slowest rank / mean | s |")
    print("|---|---|---|---|---|---|")
    for trace, cases in traces.items():
        for packer in (nanoslime, first_fit, karmarkar_karp):
            found = [measure(packer, lengths) for lengths in cases]
            worst = min(found, key=lambda quality: quality.fill)
            slowest_over_mean = max(quality.slowest_over_mean for quality in found)
            seconds = max(quality.seconds for quality in found)
            cells = f"{worst.fill:.3f} | {worst.most_possible:.3f} | {slowest_over_mean:.4f}"
            print(f"| {trace} | {packer.__name__} | {cells} | {seconds:.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
