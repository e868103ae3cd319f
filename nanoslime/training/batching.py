"""From scored groups to the TrainBatch of each optimizer step and data-parallel rank. Deterministic, no I/O.

    groups -> steps (contiguous) -> micro-batches on ranks (training/packing.py)

Denominators are those of the whole step, taken before the split, so that the split cannot change the loss.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from nanoslime.batch import TrainBatch
from nanoslime.training.packing import pack
from nanoslime.types import Sample, SampleGroup

_DUMMY_TOKENS = 2


def plan(
    groups: Sequence[SampleGroup],
    *,
    num_steps: int,
    dp_size: int,
    max_tokens: int,
    denominator: Literal["tokens", "sequences", "fixed"],
    temperature: float,
    fixed_length: int = 1,
    parity_tokens: float = 24_576,
    microbatch_multiple: int = 1,
) -> list[list[TrainBatch]]:
    """[optimizer step][data-parallel rank]: each sample once, in micro-batches of at most `max_tokens`.

    A longer sequence goes alone. Ranks of a step have equally many micro-batches, a multiple of
    `microbatch_multiple`; where sequences do not suffice, one of a masked-out dummy sequence fills the gap.
    `denominator`: "tokens", the step's loss is the mean over its tokens; "sequences", the mean over its
    rollouts of the mean over each rollout's tokens (siblings together); "fixed", over its rollouts of their
    sum over `fixed_length`. `parity_tokens`, for the balance: see ModelShape.attention_parity_tokens. With
    fewer groups than `num_steps` there are fewer steps, with none an empty list.
    Raises ValueError for a sample without an advantage, or with token 0 in the loss.
    """
    by_id: dict[int, list[Sample]] = {}
    for group in groups:
        for sample in group.samples:
            by_id.setdefault(sample.group_id, []).append(sample)
    whole_groups, bounds = (
        list(by_id.values()),
        [len(by_id) * i // num_steps for i in range(num_steps + 1)],
    )
    steps = [[s for group in whole_groups[a:b] for s in group] for a, b in pairwise(bounds)]
    options = (
        dp_size,
        max_tokens,
        parity_tokens,
        microbatch_multiple,
        denominator,
        temperature,
        fixed_length,
    )
    return [_plan_step(step, *options) for step in steps if step]


def _plan_step(
    samples: list[Sample],
    dp_size: int,
    max_tokens: int,
    parity_tokens: float,
    multiple: int,
    denominator: str,
    temperature: float,
    fixed_length: int,
) -> list[TrainBatch]:
    tokens_of_rollout: Counter[tuple[int, int]] = Counter()
    for sample in samples:
        _check(sample)
        tokens_of_rollout[sample.group_id, sample.rollout_id] += sample.num_response_tokens
    num_tokens = tokens_of_rollout.total()
    experts = next(
        (s.routed_experts.shape[1:] for s in samples if s.routed_experts is not None), None
    )

    def weight(sample: Sample) -> float:
        size = (
            tokens_of_rollout[sample.group_id, sample.rollout_id]
            if denominator == "sequences"
            else 1
        )
        return 1 / max(size, 1)

    per_rollout = fixed_length if denominator == "fixed" else 1
    total = max(num_tokens, 1) if denominator == "tokens" else per_rollout * len(tokens_of_rollout)
    lengths = [sample.num_tokens for sample in samples]
    limits = {"max_tokens": max_tokens, "parity_tokens": parity_tokens, "multiple": multiple}
    ranks = pack(lengths, num_ranks=dp_size, **limits)
    return [
        _shard(
            [samples[i] for i in indices],
            [list(range(a, b)) for a, b in pairwise(accumulate(map(len, microbatches), initial=0))],
            experts,
            token_weights=[weight(samples[i]) for i in indices],
            denominator=float(total),
            num_tokens=num_tokens,
            num_sequences=len(samples),
            temperature=temperature,
        )
        for microbatches in ranks
        for indices in [[i for microbatch in microbatches for i in microbatch]]
    ]


def _shard(
    samples: list[Sample],
    microbatches: list[list[int]],
    experts: tuple[int, ...] | None,
    **of_the_step: Any,
) -> TrainBatch:
    """The tensors of one rank; each empty micro-batch gets a dummy sequence, which is not in the loss.
    `experts`: (num_moe_layers, topk), where samples of the step hold routed experts."""
    batch = TrainBatch(
        token_ids=[torch.tensor(s.token_ids, dtype=torch.long) for s in samples],
        loss_mask=[torch.tensor(s.loss_mask, dtype=torch.bool) for s in samples],
        rollout_logprobs=[torch.tensor(s.rollout_logprobs, dtype=torch.float32) for s in samples],
        advantages=[float(s.advantage) for s in samples if s.advantage is not None],
        microbatches=microbatches,
        routed_experts=[_experts(s, experts) for s in samples] if experts else None,
        **of_the_step,
    )
    for empty in (m for m in microbatches if not m):
        empty.append(len(batch.token_ids))
        batch.token_ids.append(torch.zeros(_DUMMY_TOKENS, dtype=torch.long))
        batch.loss_mask.append(torch.zeros(_DUMMY_TOKENS, dtype=torch.bool))
        batch.rollout_logprobs.append(torch.zeros(_DUMMY_TOKENS))
        if experts and batch.routed_experts is not None:
            batch.routed_experts.append(
                torch.full((_DUMMY_TOKENS, *experts), -1, dtype=torch.int16)
            )
        batch.advantages.append(0.0)
        batch.token_weights.append(0.0)
    return batch


def _experts(sample: Sample, size: tuple[int, ...]) -> Tensor:
    """int16 [T, *size]; -1 for what the engine did not run: the last token, and a sample without response."""
    experts = torch.full((sample.num_tokens, *size), -1, dtype=torch.int16)
    if sample.routed_experts is not None:
        experts[:-1] = torch.tensor(sample.routed_experts)
    elif sample.num_response_tokens:
        raise ValueError(
            f"a sample of group {sample.group_id} lacks routed_experts, which others have"
        )
    return experts


def _check(sample: Sample) -> None:
    where = f"sample of group {sample.group_id}, rollout {sample.rollout_id}"
    if sample.advantage is None:
        raise ValueError(f"{where} has no advantage; Algorithm.advantages comes before the plan")
    if not len(sample.token_ids) == len(sample.loss_mask) == len(sample.rollout_logprobs):
        raise ValueError(f"{where}: token_ids, loss_mask and rollout_logprobs must be equally long")
    if sample.loss_mask[0]:
        raise ValueError(f"{where}: token 0 is in the loss, but nothing precedes it to predict it")
