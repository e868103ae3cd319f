"""Whole sequences into micro-batches within a token budget, and micro-batches onto ranks of equal cost.

    lengths -> as few micro-batches as fit, a multiple of the ranks -> equally many per rank -> exchanges

Pure arithmetic, deterministic. Cost is what the matrix products take, which grows with a sequence's tokens,
and what attention takes, which grows with their square.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from itertools import count

import numpy as np

_CLOSE_ENOUGH = 1.002  # slowest rank over mean, where exchanges between ranks end
_PARTNERS = 4  # cheapest ranks that are tried before they end in any case


def sequence_costs(lengths: Sequence[int], parity_tokens: float) -> list[float]:
    """In tokens' worth of matrix products; attention adds as much again to a sequence of `parity_tokens`."""
    return [n * (1 + n / parity_tokens) for n in lengths]


def pack(
    lengths: Sequence[int],
    *,
    num_ranks: int,
    max_tokens: int,
    parity_tokens: float,
    multiple: int = 1,
) -> list[list[list[int]]]:
    """[rank][micro-batch]: indices of sequences, each once, in micro-batches of at most `max_tokens`.

    Ranks have equally many micro-batches, a multiple of `multiple`, the costliest first; a longer sequence
    has one for itself. None is empty unless there are fewer sequences than the micro-batches that the longest
    ones, the ranks and `multiple` ask for.
    """
    costs = sequence_costs(lengths, parity_tokens)
    sizes = [min(n, max_tokens) for n in lengths]
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    least = max(-(-sum(sizes) // (max_tokens * num_ranks)), 1)
    bins = next(
        found
        for per_rank in count(-(-least // multiple) * multiple, multiple)
        for fill in (_fill_evenly, _fill_tightly)
        if (found := fill(order, sizes, costs, per_rank * num_ranks, max_tokens)) is not None
    )
    ranks = _deal(_without_empty(bins), costs, num_ranks)
    _exchange(ranks, sizes, costs, max_tokens)
    return [
        sorted(map(sorted, rank), key=lambda m: (-sum(costs[i] for i in m), m)) for rank in ranks
    ]


def _fill_evenly(
    order: list[int], sizes: list[int], costs: list[float], num_bins: int, max_tokens: int
) -> list[list[int]] | None:
    """Longest first, each into the bin of least cost that has room; None where one finds no room."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    room = [max_tokens] * num_bins
    by_cost = [(0.0, b) for b in range(num_bins)]
    for i in order:
        full = []
        while by_cost and room[by_cost[0][1]] < sizes[i]:
            full.append(heappop(by_cost))
        if not by_cost:
            return None
        cost, b = heappop(by_cost)
        bins[b].append(i)
        room[b] -= sizes[i]
        full.append((cost + costs[i], b))
        for entry in full:
            heappush(by_cost, entry)
    return bins


def _fill_tightly(
    order: list[int], sizes: list[int], costs: list[float], num_bins: int, max_tokens: int
) -> list[list[int]] | None:
    """Longest first, each into the bin with the least room that suffices (best fit); None where none does."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    room = [(max_tokens, b) for b in range(num_bins)]  # sorted
    for i in order:
        at = bisect_left(room, (sizes[i], -1))
        if at == len(room):
            return None
        left, b = room.pop(at)
        bins[b].append(i)
        insort(room, (left - sizes[i], b))
    return bins


def _without_empty(bins: list[list[int]]) -> list[list[int]]:
    """As many bins, with halves of those with the most sequences in the place of empty ones."""
    for empty in (b for b in bins if not b):
        largest = max(bins, key=len)
        half = max(len(largest) // 2, 1)
        empty.extend(largest[half:])
        del largest[half:]
    return bins


def _deal(bins: list[list[int]], costs: list[float], num_ranks: int) -> list[list[list[int]]]:
    """Costliest first, each to the rank of least cost that has not yet its share of the bins."""
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    loads = [(0.0, r) for r in range(num_ranks)]
    heapify(loads)
    cost_of = [sum(costs[i] for i in b) for b in bins]
    for b in sorted(range(len(bins)), key=lambda b: (-cost_of[b], b)):
        load, r = heappop(loads)
        ranks[r].append(bins[b])
        if len(ranks[r]) < len(bins) // num_ranks:
            heappush(loads, (load + cost_of[b], r))
    return ranks


def _exchange(
    ranks: list[list[list[int]]], sizes: list[int], costs: list[float], max_tokens: int
) -> None:
    """In place: sequences of the costliest rank change places with cheaper or none of the cheapest ranks."""
    loads = [sum(costs[i] for b in rank for i in b) for rank in ranks]
    mean = sum(loads) / len(loads)
    for _ in range(16 * len(ranks)):
        by_load = sorted(range(len(ranks)), key=lambda r: (loads[r], r))
        heavy = by_load[-1]
        if loads[heavy] <= _CLOSE_ENOUGH * mean:
            return
        for light in by_load[:_PARTNERS]:
            gap = loads[heavy] - loads[light]
            if swap := _best_swap(ranks[heavy], ranks[light], gap, sizes, costs, max_tokens):
                source, gone, target, come = swap
                source.remove(gone)
                target.append(gone)
                moved = costs[gone]
                if come is not None:
                    target.remove(come)
                    source.append(come)
                    moved -= costs[come]
                loads[heavy], loads[light] = loads[heavy] - moved, loads[light] + moved
                break
        else:
            return


def _best_swap(
    heavy: list[list[int]],
    light: list[list[int]],
    gap: float,
    sizes: list[int],
    costs: list[float],
    max_tokens: int,
) -> tuple[list[int], int, list[int], int | None] | None:
    """(its bin, sequence) of `heavy` for (its bin, sequence or None) of `light`, nearest to half the gap.

    None where no exchange within the budget takes at least a hundredth off the gap.
    """
    goers = [(b, i) for b in heavy for i in b]
    comers: list[tuple[list[int], int | None]] = [(b, i) for b in light for i in (*b, None)]
    room = {id(b): max_tokens - sum(sizes[i] for i in b) for b in light}
    size_out = np.array([sizes[i] for _, i in goers])[:, None]
    place = np.array([room[id(b)] + (0 if j is None else sizes[j]) for b, j in comers])[None]
    moved = np.array([costs[i] for _, i in goers])[:, None]
    moved = moved - np.array([0.0 if j is None else costs[j] for _, j in comers])[None]
    last = (
        np.array([len(b) == 1 for b, _ in goers])[:, None]
        & np.array([j is None for _, j in comers])[None]
    )
    off = np.where((size_out <= place) & ~last, np.abs(moved - gap / 2), np.inf)
    best = int(off.argmin())
    if not off.flat[best] < 0.49 * gap:
        return None
    at, to = divmod(best, len(comers))
    return *goers[at], *comers[to]
