"""From scored groups to the TrainBatch of each optimizer step and data-parallel rank. Deterministic, no I/O.

    groups -> steps (contiguous) -> ranks (balanced by cost) -> micro-batches (within the token budget)

Denominators are those of the whole step, taken before the split, so that the split cannot change the loss.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch

from nanoslime.batch import TrainBatch
from nanoslime.types import Sample, SampleGroup

# Length at which attention costs as much as the matrix products, for a hidden size of 4,096 (6 x hidden).
_ATTENTION_PARITY_TOKENS = 24_576
_DUMMY_TOKENS = 2


def plan(
    groups: Sequence[SampleGroup], *, num_steps: int, dp_size: int, max_tokens: int,
    denominator: Literal["tokens", "sequences"], temperature: float,
) -> list[list[TrainBatch]]:  # fmt: skip
    """[optimizer step][data-parallel rank]: each sample once, in micro-batches of at most `max_tokens`.

    A longer sequence goes alone. Ranks of a step have equally many micro-batches; where sequences do not
    suffice, one of a masked-out dummy sequence fills the gap. `denominator`: "tokens", the step's loss is the
    mean over its tokens; "sequences", the mean over its rollouts of the mean over each rollout's tokens
    (siblings together). With fewer groups than `num_steps` there are fewer steps, with none an empty list.
    Raises ValueError for a sample without an advantage, or with token 0 in the loss.
    """
    by_id: dict[int, list[Sample]] = {}
    for group in groups:
        for sample in group.samples:
            by_id.setdefault(sample.group_id, []).append(sample)
    whole_groups, bounds = list(by_id.values()), [len(by_id) * i // num_steps for i in range(num_steps + 1)]
    steps = [[s for group in whole_groups[a:b] for s in group] for a, b in pairwise(bounds)]
    return [_plan_step(step, dp_size, max_tokens, denominator, temperature) for step in steps if step]


def _plan_step(
    samples: list[Sample], dp_size: int, max_tokens: int, denominator: str, temperature: float
) -> list[TrainBatch]:
    tokens_of_rollout: Counter[tuple[int, int]] = Counter()
    for sample in samples:
        _check(sample)
        tokens_of_rollout[sample.group_id, sample.rollout_id] += sample.num_response_tokens
    num_tokens = tokens_of_rollout.total()

    def weight(sample: Sample) -> float:
        size = 1 if denominator == "tokens" else tokens_of_rollout[sample.group_id, sample.rollout_id]
        return 1 / max(size, 1)

    lengths = [sample.num_tokens for sample in samples]
    ranks = _balance(lengths, dp_size)
    cuts = [_pack([lengths[i] for i in indices], max_tokens) for indices in ranks]
    num_microbatches = max(len(cut) for cut in cuts)
    return [
        _shard(
            [samples[i] for i in indices],
            _split_up_to(num_microbatches, cut),
            token_weights=[weight(samples[i]) for i in indices],
            denominator=float(max(num_tokens, 1) if denominator == "tokens" else len(tokens_of_rollout)),
            num_tokens=num_tokens,
            num_sequences=len(samples),
            temperature=temperature,
        )
        for indices, cut in zip(ranks, cuts, strict=True)
    ]


def _shard(samples: list[Sample], microbatches: list[list[int]], **of_the_step: Any) -> TrainBatch:
    """The tensors of one rank; each empty micro-batch gets a dummy sequence, which is not in the loss."""
    batch = TrainBatch(
        token_ids=[torch.tensor(s.token_ids, dtype=torch.long) for s in samples],
        loss_mask=[torch.tensor(s.loss_mask, dtype=torch.bool) for s in samples],
        rollout_logprobs=[torch.tensor(s.rollout_logprobs, dtype=torch.float32) for s in samples],
        advantages=[float(s.advantage) for s in samples if s.advantage is not None],
        microbatches=microbatches,
        **of_the_step,
    )
    for empty in (m for m in microbatches if not m):
        empty.append(len(batch.token_ids))
        batch.token_ids.append(torch.zeros(_DUMMY_TOKENS, dtype=torch.long))
        batch.loss_mask.append(torch.zeros(_DUMMY_TOKENS, dtype=torch.bool))
        batch.rollout_logprobs.append(torch.zeros(_DUMMY_TOKENS))
        batch.advantages.append(0.0)
        batch.token_weights.append(0.0)
    return batch


def _balance(lengths: list[int], num_ranks: int) -> list[list[int]]:
    """Indices per rank, in order: the costliest sequence first, always to the rank with the least so far."""
    costs = [n * (1 + n / _ATTENTION_PARITY_TOKENS) for n in lengths]
    loads = [0.0] * num_ranks
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = loads.index(min(loads))
        loads[rank] += costs[i]
        ranks[rank].append(i)
    return [sorted(rank) for rank in ranks]


def _pack(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Indices per micro-batch, first fit decreasing; a sequence above the budget has one for itself."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = next((b for b, left in enumerate(room) if left >= lengths[i]), None)
        if fits is None:
            bins.append([i])
            room.append(max_tokens - lengths[i])
        else:
            bins[fits].append(i)
            room[fits] -= lengths[i]
    return [sorted(b) for b in bins]


def _split_up_to(count: int, bins: list[list[int]]) -> list[list[int]]:
    """Exactly `count` micro-batches: those with the most sequences are halved, then empty ones are added."""
    bins = [list(b) for b in bins]
    while len(bins) < count:
        largest = max(bins, key=len, default=[])
        half = max(len(largest) // 2, 1)
        bins.append(largest[half:])
        del largest[half:]
    return bins


def _check(sample: Sample) -> None:
    where = f"sample of group {sample.group_id}, rollout {sample.rollout_id}"
    if sample.advantage is None:
        raise ValueError(f"{where} has no advantage; Algorithm.advantages comes before the plan")
    if not len(sample.token_ids) == len(sample.loss_mask) == len(sample.rollout_logprobs):
        raise ValueError(f"{where}: token_ids, loss_mask and rollout_logprobs must be equally long")
    if sample.loss_mask[0]:
        raise ValueError(f"{where}: token 0 is in the loss, but nothing precedes it to predict it")
