"""Packing and balance of sequences beside first-fit-decreasing and Karmarkar-Karp.

    python tools/bench_packing.py [--gsm8k DIR] [--seeds 20]

Per plan: tokens over (micro-batches x budget), the most that any plan with equally many micro-batches per
rank can have, the slowest rank's cost over the mean, and the time. The traces: prompts and answers of GSM8K
at four characters to a token, each once and eight times, and log-normal lengths, exp(Normal(ln median, 1)),
cut at the budget.
"""

import heapq
import json
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nanoslime.training.packing import pack, sequence_costs

NUM_RANKS, BUDGET, PARITY_TOKENS = 8, 16_384, 24_576.0
GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k"
Plan = list[list[list[int]]]  # [rank][micro-batch]: sequences
Planner = Callable[[list[int]], Plan]


def long_tail(seed: int, median: float, number: int) -> list[int]:
    lengths = np.random.default_rng(seed).lognormal(np.log(median), 1.0, number)
    return lengths.clip(1, BUDGET).astype(int).tolist()


def gsm8k(directory: Path, number: int) -> tuple[str, list[int]]:
    """The name of the trace and its lengths; without the data, by a formula that comes near them."""
    file = directory / "train.jsonl"
    if file.exists():
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        texts = [row["question"] + row["answer"] for row in rows[:number]]
        return "GSM8K", [len(text) // 4 + 1 for text in texts]
    print(
        f"{file} does not exist: lengths are exp(Normal(ln 124, 0.42)) instead, near those of GSM8K"
    )
    lengths = np.random.default_rng(0).lognormal(np.log(124), 0.42, number)
    return "GSM8K, by formula", lengths.astype(int).tolist()


def nanoslime(lengths: list[int]) -> Plan:
    return pack(lengths, num_ranks=NUM_RANKS, max_tokens=BUDGET, parity_tokens=PARITY_TOKENS)


def first_fit(lengths: list[int]) -> Plan:
    """First-fit-decreasing micro-batches, dealt to the ranks in turn."""
    bins = first_fit_decreasing(range(len(lengths)), lengths)
    return [bins[rank::NUM_RANKS] for rank in range(NUM_RANKS)]


def karmarkar_karp(lengths: list[int]) -> Plan:
    """Sequences to ranks by the largest differencing method, then first-fit-decreasing on each rank."""
    parts: list[tuple[float, int, list[tuple[float, list[int]]]]] = []
    for i, cost in enumerate(sequence_costs(lengths, PARITY_TOKENS)):
        parts.append((-cost, i, [(cost, [i])] + [(0.0, [])] * (NUM_RANKS - 1)))
    heapq.heapify(parts)
    while len(parts) > 1:  # the two most uneven become one: heaviest with lightest
        (_, order, a), (_, _, b) = heapq.heappop(parts), heapq.heappop(parts)
        pairs = zip(a, reversed(b), strict=True)
        sums = sorted(((x + y, [*s, *t]) for (x, s), (y, t) in pairs), key=lambda s: -s[0])
        heapq.heappush(parts, (sums[-1][0] - sums[0][0], order, sums))
    return [first_fit_decreasing(indices, lengths) for _, indices in parts[0][2]]


def first_fit_decreasing(indices: list[int] | range, lengths: list[int]) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(indices, key=lambda i: -lengths[i]):
        b = next((b for b, left in enumerate(room) if left >= lengths[i]), len(bins))
        if b == len(bins):
            bins.append([])
            room.append(BUDGET)
        bins[b].append(i)
        room[b] -= lengths[i]
    return bins


def measure(planner: Planner, lengths: list[int]) -> tuple[float, float, float, float]:
    """Fill, the most it can be, slowest rank over mean, seconds; ranks run equally many micro-batches."""
    started = time.perf_counter()
    plan = planner(lengths)
    seconds = time.perf_counter() - started
    costs = sequence_costs(lengths, PARITY_TOKENS)
    assert sorted(i for rank in plan for m in rank for i in m) == list(range(len(lengths)))
    slots, least = (
        NUM_RANKS * max(map(len, plan)),
        -(-sum(lengths) // (NUM_RANKS * BUDGET)) * NUM_RANKS,
    )
    loads = [sum(costs[i] for m in rank for i in m) for rank in plan]
    fill, most = (sum(lengths) / (count * BUDGET) for count in (slots, least))
    return fill, most, max(loads) * NUM_RANKS / sum(loads), seconds


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--gsm8k", type=Path, default=GSM8K, help="directory with train.jsonl (%(default)s)")
    add("--seeds", type=int, default=20, help="long-tail traces of each kind (%(default)s)")
    add("--median", type=float, default=4096, help="of the long tail, in tokens (%(default)s)")
    arguments = parser.parse_args(argv)
    name, lengths = gsm8k(arguments.gsm8k, 7473)
    traces = {
        f"{name}, {len(lengths)}{times}": [lengths * n] for n, times in ((1, ""), (8, " x 8"))
    }
    for number, median in ((512, arguments.median), (512, 2048.0), (8192, 2048.0)):
        seeds = range(arguments.seeds if number == 512 else 1)
        traces[f"log-normal, median {median:g}, {number}, seed 0"] = [long_tail(0, median, number)]
        if len(seeds) > 1:
            key = f"log-normal, median {median:g}, {number}, worst of {len(seeds)} seeds"
            traces[key] = [long_tail(seed, median, number) for seed in seeds]
    print(f"DP {NUM_RANKS}, budget {BUDGET}\n")
    print(
        "| trace | plan | fill | most possible | slowest rank / mean | s |\n|---|---|---|---|---|---|"
    )
    for trace, cases in traces.items():
        for planner in (nanoslime, first_fit, karmarkar_karp):
            results = np.array([measure(planner, lengths) for lengths in cases])
            worst = results[np.argmin(results[:, 0])]
            balance, seconds = results[:, 2].max(), results[:, 3].max()
            cells = f"{worst[0]:.3f} | {worst[1]:.3f} | {balance:.4f} | {seconds:.3f}"
            print(f"| {trace} | {planner.__name__} | {cells} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
