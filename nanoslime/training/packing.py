"""Whole sequences into micro-batches within a token budget, and these onto ranks of equal
cost.

    lengths -> as few micro-batches as fit, a multiple of the ranks -> equally many per rank
            -> exchanges

Pure arithmetic, deterministic. The cost of a sequence is that of its matrix products,
which grows with its tokens, plus that of attention, which grows with their square.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

# Exchanges between ranks end where the load of the slowest rank over the mean is at most
# this.
_CLOSE_ENOUGH = 1.002
# So many of the cheapest ranks are tried before exchanges end in any case.
_PARTNERS = 4

Indices = list[int]  # the sequences of one micro-batch


@dataclass(frozen=True, slots=True)
class _Sequences:
    order: list[int]  # indices, the longest first
    sizes: list[int]  # tokens by index, at most max_tokens
    costs: list[float]  # by index
    max_tokens: int  # the budget of a micro-batch

    def cost(self, microbatch: Indices) -> float:
        return sum(self.costs[i] for i in microbatch)


def sequence_costs(lengths: Sequence[int], parity_tokens: float) -> list[float]:
    """Costs in tokens' worth of matrix products.

    At a length of `parity_tokens`, attention costs as much as the matrix products.
    """
    return [n * (1 + n / parity_tokens) for n in lengths]


def pack(
    lengths: Sequence[int],
    *,
    num_ranks: int,
    max_tokens: int,
    parity_tokens: float,
    multiple: int = 1,
) -> list[list[Indices]]:
    """[rank][micro-batch]: indices of sequences, each once, at most `max_tokens`
    together.

    A longer sequence has a micro-batch for itself. Ranks have equally many micro-batches,
    a multiple of `multiple`, the costliest first. None is empty unless there are fewer
    sequences than the micro-batches that the longest ones, the ranks and `multiple` ask
    for.
    """
    sequences = _Sequences(
        order=sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)),
        sizes=[min(n, max_tokens) for n in lengths],
        costs=sequence_costs(lengths, parity_tokens),
        max_tokens=max_tokens,
    )
    microbatches = _fill(sequences, num_ranks, multiple)
    _halve_largest_for_empty(microbatches)
    ranks = _deal(microbatches, sequences, num_ranks)
    _exchange(ranks, sequences)
    return [sorted(rank, key=lambda m: (-sequences.cost(m), m)) for rank in ranks]


def _fill(sequences: _Sequences, num_ranks: int, multiple: int) -> list[Indices]:
    """As few micro-batches as two ways of filling manage with, a `multiple` for each
    rank.
    """
    tokens_of_one_each = sequences.max_tokens * num_ranks
    least = max(-(-sum(sequences.sizes) // tokens_of_one_each), 1)
    per_rank = -(-least // multiple) * multiple
    while True:
        microbatches = _fill_evenly(sequences, per_rank * num_ranks)
        if microbatches is None:
            microbatches = _fill_tightly(sequences, per_rank * num_ranks)
        if microbatches is not None:
            return microbatches
        per_rank += multiple


def _fill_evenly(sequences: _Sequences, number: int) -> list[Indices] | None:
    """Puts each sequence, longest first, into the micro-batch of least cost that has
    room.

    None where one finds no room in `number` micro-batches.
    """
    microbatches: list[Indices] = [[] for _ in range(number)]
    room = [sequences.max_tokens] * number
    by_cost = [(0.0, m) for m in range(number)]  # a heap
    for i in sequences.order:
        size = sequences.sizes[i]
        too_full = []
        while by_cost and room[by_cost[0][1]] < size:
            too_full.append(heappop(by_cost))
        if not by_cost:
            return None
        cost, m = heappop(by_cost)
        microbatches[m].append(i)
        room[m] -= size
        heappush(by_cost, (cost + sequences.costs[i], m))
        for entry in too_full:
            heappush(by_cost, entry)
    return microbatches


def _fill_tightly(sequences: _Sequences, number: int) -> list[Indices] | None:
    """Puts each sequence, longest first, where the least room suffices (best fit).

    None where one finds no room in `number` micro-batches.
    """
    microbatches: list[Indices] = [[] for _ in range(number)]
    room = [(sequences.max_tokens, m) for m in range(number)]  # sorted
    for i in sequences.order:
        size = sequences.sizes[i]
        at = bisect_left(room, (size, -1))
        if at == len(room):
            return None
        left, m = room.pop(at)
        microbatches[m].append(i)
        insort(room, (left - size, m))
    return microbatches


def _halve_largest_for_empty(microbatches: list[Indices]) -> None:
    """In place: an empty micro-batch gets half of the one with the most sequences."""
    for empty in [m for m in microbatches if not m]:
        largest = max(microbatches, key=len)
        half = max(len(largest) // 2, 1)
        empty.extend(largest[half:])
        del largest[half:]


def _deal(
    microbatches: list[Indices], sequences: _Sequences, num_ranks: int
) -> list[list[Indices]]:
    """Costliest first, each to the rank of least cost that lacks some of its share."""
    share = len(microbatches) // num_ranks
    ranks: list[list[Indices]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for microbatch in sorted(microbatches, key=sequences.cost, reverse=True):
        lacking = [rank for rank in range(num_ranks) if len(ranks[rank]) < share]
        rank = min(lacking, key=loads.__getitem__)
        ranks[rank].append(microbatch)
        loads[rank] += sequences.cost(microbatch)
    return ranks


def _exchange(ranks: list[list[Indices]], sequences: _Sequences) -> None:
    """In place: the costliest rank gives sequences to the cheapest ranks, for cheaper ones in
    return, until it costs little more than the mean or nothing helps.

    Of two ranks those sequences change places that bring the ranks nearest to each other. Each
    micro-batch has one more sequence, without tokens, for which a sequence may be given too; but
    none is left with these alone.
    """
    share = len(ranks[0])
    microbatches = [microbatch for rank in ranks for microbatch in rank]
    num_sequences = len(sequences.sizes)
    sizes = np.array(sequences.sizes + [0] * len(microbatches))
    costs = np.array(sequences.costs + [0.0] * len(microbatches))
    place = np.arange(len(sizes)) - num_sequences  # by sequence, its micro-batch
    for number, microbatch in enumerate(microbatches):
        place[microbatch] = number
    for _ in range(16 * len(ranks)):
        rank_of = place // share
        loads = np.bincount(rank_of, costs, len(ranks))
        by_load = loads.argsort(kind="stable")
        heavy = by_load[-1]
        if loads[heavy] <= _CLOSE_ENOUGH * loads.mean():
            break
        room = sequences.max_tokens - np.bincount(place, sizes, len(microbatches))
        is_alone = np.bincount(place[:num_sequences], minlength=len(microbatches)) == 1
        goers = np.flatnonzero(rank_of == heavy)
        for light in by_load[:_PARTNERS]:
            comers = np.flatnonzero(rank_of == light)
            gap = loads[heavy] - loads[light]
            fits = sizes[goers, None] <= room[place[comers]] + sizes[comers]
            fits &= ~is_alone[place[goers], None] | (comers < num_sequences)
            moved_costs = costs[goers, None] - costs[comers]
            distance = np.where(fits, np.abs(moved_costs - gap / 2), np.inf)
            if distance.min() < 0.49 * gap:  # else it hardly helps
                goer, comer = np.divmod(distance.argmin(), len(comers))
                pair = [goers[goer], comers[comer]]
                place[pair] = place[pair[::-1]]
                break
        else:
            break
    for number, microbatch in enumerate(microbatches):
        microbatch[:] = np.flatnonzero(place[:num_sequences] == number).tolist()
