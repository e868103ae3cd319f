"""From scored groups to the TrainBatch of each optimizer step and data-parallel rank.

    groups -> optimizer steps (contiguous) -> micro-batches on ranks (training/packing.py)

It is deterministic and without I/O. Denominators belong to a whole step and are computed
before the split, so that the split cannot change the loss.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal

import torch
from torch import Tensor

from nanoslime.batch import TrainBatch
from nanoslime.training.packing import pack
from nanoslime.types import Sample, SampleGroup

_DUMMY_TOKENS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchingOptions:
    """How the samples of a rollout are cut into optimizer steps, ranks and micro-batches.

    The loss of a step is, by `denominator`: "tokens", the mean over its tokens;
    "sequences", the mean over its rollouts of the mean over each rollout's tokens,
    siblings together; "fixed", the mean over its rollouts of their sum over
    `fixed_length`.
    """

    num_steps: int  # with fewer groups there are fewer steps
    dp_size: int
    max_tokens: int  # per micro-batch; a longer sequence has one for itself
    denominator: Literal["tokens", "sequences", "fixed"]
    temperature: float
    fixed_length: int = 1
    # A sequence of so many tokens costs as much in attention as in matrix products: see
    # ModelShape.attention_parity_tokens.
    parity_tokens: float = 24_576
    microbatch_multiple: int = 1  # the number of micro-batches per rank is a multiple of it


def make_train_batches(
    groups: Sequence[SampleGroup], options: BatchingOptions
) -> list[list[TrainBatch]]:
    """[optimizer step][data-parallel rank]: batches that hold each sample once.

    The ranks of a step have equally many micro-batches. Where sequences do not suffice, a
    masked-out dummy sequence fills a micro-batch. Without groups there are no steps.
    Raises ValueError for a sample without an advantage, or with token 0 in the loss.
    """
    steps = _split_into_steps(groups, options.num_steps)
    return [_make_step(samples, options) for samples in steps if samples]


def _split_into_steps(groups: Sequence[SampleGroup], num_steps: int) -> list[list[Sample]]:
    """The samples of each step. Those of one group_id stay together."""
    samples_by_id: dict[int, list[Sample]] = {}
    for group in groups:
        for sample in group.samples:
            samples_by_id.setdefault(sample.group_id, []).append(sample)
    whole_groups = list(samples_by_id.values())
    steps = []
    for step in range(num_steps):
        start = len(whole_groups) * step // num_steps
        stop = len(whole_groups) * (step + 1) // num_steps
        steps.append([sample for group in whole_groups[start:stop] for sample in group])
    return steps


def _make_step(samples: list[Sample], options: BatchingOptions) -> list[TrainBatch]:
    """One TrainBatch per data-parallel rank, from all samples of an optimizer step."""
    rollout_tokens: Counter[tuple[int, int]] = Counter()
    for sample in samples:
        _check(sample)
        rollout_tokens[sample.group_id, sample.rollout_id] += sample.num_response_tokens
    num_tokens = rollout_tokens.total()
    num_rollouts = len(rollout_tokens)
    match options.denominator:
        case "tokens":
            denominator = max(num_tokens, 1)
        case "sequences":
            denominator = num_rollouts
        case "fixed":
            denominator = num_rollouts * options.fixed_length

    def token_weight(sample: Sample) -> float:
        if options.denominator != "sequences":
            return 1.0
        return 1 / max(rollout_tokens[sample.group_id, sample.rollout_id], 1)

    expert_shape = _expert_shape(samples)
    ranks = pack(
        [sample.num_tokens for sample in samples],
        num_ranks=options.dp_size,
        max_tokens=options.max_tokens,
        parity_tokens=options.parity_tokens,
        multiple=options.microbatch_multiple,
    )
    batches = []
    for microbatches in ranks:
        mine = [samples[i] for microbatch in microbatches for i in microbatch]
        batch = TrainBatch(
            token_ids=[torch.tensor(s.token_ids, dtype=torch.long) for s in mine],
            loss_mask=[torch.tensor(s.loss_mask, dtype=torch.bool) for s in mine],
            rollout_logprobs=[torch.tensor(s.rollout_logprobs, dtype=torch.float32) for s in mine],
            advantages=[float(s.advantage) for s in mine if s.advantage is not None],
            token_weights=[token_weight(s) for s in mine],
            microbatches=_counted_from_zero(microbatches),
            denominator=float(denominator),
            num_tokens=num_tokens,
            num_sequences=len(samples),
            temperature=options.temperature,
        )
        if expert_shape is not None:
            batch.routed_experts = [_routed_experts(s, expert_shape) for s in mine]
        _fill_with_dummies(batch, expert_shape)
        batches.append(batch)
    return batches


def _counted_from_zero(microbatches: list[list[int]]) -> list[list[int]]:
    """Micro-batches of the same sizes whose sequences are numbered in order."""
    numbers = count()
    return [[next(numbers) for _ in microbatch] for microbatch in microbatches]


def _fill_with_dummies(batch: TrainBatch, expert_shape: tuple[int, ...] | None) -> None:
    """Gives each empty micro-batch a dummy sequence, which is not in the loss."""
    for microbatch in batch.microbatches:
        if microbatch:
            continue
        microbatch.append(len(batch.token_ids))
        batch.token_ids.append(torch.zeros(_DUMMY_TOKENS, dtype=torch.long))
        batch.loss_mask.append(torch.zeros(_DUMMY_TOKENS, dtype=torch.bool))
        batch.rollout_logprobs.append(torch.zeros(_DUMMY_TOKENS))
        batch.advantages.append(0.0)
        batch.token_weights.append(0.0)
        if expert_shape is not None and batch.routed_experts is not None:
            batch.routed_experts.append(_unknown_experts(_DUMMY_TOKENS, expert_shape))


def _expert_shape(samples: list[Sample]) -> tuple[int, ...] | None:
    """(num_moe_layers, topk) if any sample holds routed experts."""
    for sample in samples:
        if sample.routed_experts is not None:
            return sample.routed_experts.shape[1:]
    return None


def _routed_experts(sample: Sample, expert_shape: tuple[int, ...]) -> Tensor:
    """int16 [T, *expert_shape]; -1 for the tokens that the engine did not run.

    These are the last token, and all tokens of a sample without a response.
    """
    experts = _unknown_experts(sample.num_tokens, expert_shape)
    if sample.routed_experts is not None:
        experts[:-1] = torch.tensor(sample.routed_experts)
    elif sample.num_response_tokens:
        raise ValueError(
            f"a sample of group {sample.group_id} lacks routed_experts, which others have"
        )
    return experts


def _unknown_experts(num_tokens: int, expert_shape: tuple[int, ...]) -> Tensor:
    return torch.full((num_tokens, *expert_shape), -1, dtype=torch.int16)


def _check(sample: Sample) -> None:
    name = f"sample of group {sample.group_id}, rollout {sample.rollout_id}"
    if sample.advantage is None:
        raise ValueError(f"{name} has no advantage; Algorithm.advantages comes before batching")
    if not len(sample.token_ids) == len(sample.loss_mask) == len(sample.rollout_logprobs):
        raise ValueError(
            f"{name}: token_ids, loss_mask and rollout_logprobs must be equally long, but have"
            f" {len(sample.token_ids)}, {len(sample.loss_mask)}"
            f" and {len(sample.rollout_logprobs)} entries"
        )
    if sample.loss_mask[0]:
        raise ValueError(f"{name}: token 0 is in the loss, but nothing precedes it to predict it")
