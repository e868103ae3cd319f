"""From scored groups to the TrainBatch of each optimizer step and data-parallel rank.

    reports -> optimizer steps (contiguous) -> micro-batches on ranks (training/packing.py)
            -> a BatchPlan for each rank -> its arrays, fetched there -> TrainBatch

It is deterministic and without I/O. Denominators belong to a whole step and are computed
before the split, so that the split cannot change the loss. The driver makes the plans from
numbers alone; the arrays of a sample are only where it is trained on.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import count
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nanoslime.batch import BatchPlan, StepShare, TrainBatch
from nanoslime.training.packing import pack
from nanoslime.types import GroupReport, KeptArrays, SampleArrays, SampleReport, Status

_DUMMY_TOKENS = 2
_DUMMY = SampleArrays(
    token_ids=np.zeros(_DUMMY_TOKENS, np.int32),
    loss_mask=np.zeros(_DUMMY_TOKENS, np.bool_),
    rollout_logprobs=np.zeros(_DUMMY_TOKENS, np.float32),
    policy_versions=[],
)


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
    # Tokens of older versions leave the loss and its denominators, and a sample that has no
    # other ones leaves the batch. None keeps all.
    oldest_version_in_loss: int | None = None
    # Samples that the token limit ended leave the batch, and so the denominators.
    mask_truncated: bool = False


def plan_train_batches(
    groups: Sequence[GroupReport], options: BatchingOptions
) -> list[list[BatchPlan]]:
    """[optimizer step][data-parallel rank]: plans of batches that hold each sample once.

    The ranks of a step have equally many micro-batches. Where sequences do not suffice, a
    masked-out dummy sequence fills a micro-batch. Without groups there are no steps.
    Raises ValueError for a sample without the routed experts that others have.
    """
    steps = _split_into_steps(groups, options)
    return [_plan_step(samples, options) for samples in steps if samples]


def kept_arrays(plans: Sequence[BatchPlan]) -> list[KeptArrays]:
    """What rollout workers keep of the sequences of `plans`, in order."""
    return [one for plan in plans for one in plan.arrays if isinstance(one, KeptArrays)]


def fill(plan: BatchPlan, fetched: Mapping[KeptArrays, SampleArrays] | None = None) -> TrainBatch:
    """The batch of `plan`; `fetched` has all that rollout workers keep of it."""
    sequences = []
    for arrays in plan.arrays:
        if arrays is None:
            sequences.append(_DUMMY)
        elif isinstance(arrays, KeptArrays):
            sequences.append(fetched[arrays])
        else:
            sequences.append(arrays)
    masks = [_loss_mask(sequence, plan.oldest_version_in_loss) for sequence in sequences]
    share = {field.name: getattr(plan, field.name) for field in fields(StepShare)}
    batch = TrainBatch(
        **share,
        token_ids=[torch.tensor(s.token_ids, dtype=torch.long) for s in sequences],
        loss_mask=[torch.tensor(mask, dtype=torch.bool) for mask in masks],
        rollout_logprobs=[torch.tensor(s.rollout_logprobs, dtype=torch.float32) for s in sequences],
    )
    if plan.expert_shape is not None:
        batch.routed_experts = [_routed_experts(s, plan.expert_shape) for s in sequences]
    return batch


def _split_into_steps(
    groups: Sequence[GroupReport], options: BatchingOptions
) -> list[list[SampleReport]]:
    """The samples of each step. Those of one group_id stay together."""
    num_steps = options.num_steps
    samples_by_id: dict[int, list[SampleReport]] = {}
    for group in groups:
        for sample in group.samples:
            if _is_stale(sample, options.oldest_version_in_loss):
                continue
            if options.mask_truncated and sample.status is Status.TRUNCATED:
                continue
            samples_by_id.setdefault(sample.group_id, []).append(sample)
    whole_groups = list(samples_by_id.values())
    steps = []
    for step in range(num_steps):
        start = len(whole_groups) * step // num_steps
        stop = len(whole_groups) * (step + 1) // num_steps
        steps.append([sample for group in whole_groups[start:stop] for sample in group])
    return steps


def _is_stale(sample: SampleReport, oldest_version: int | None) -> bool:
    """Whether no token of a sample that has some is left in the loss."""
    return sample.num_response_tokens > 0 and _num_loss_tokens(sample, oldest_version) == 0


def _num_loss_tokens(sample: SampleReport, oldest_version: int | None) -> int:
    if oldest_version is None:
        return sample.num_response_tokens
    counts = sample.loss_tokens_by_version.items()
    return sum(number for version, number in counts if version >= oldest_version)


def _plan_step(samples: list[SampleReport], options: BatchingOptions) -> list[BatchPlan]:
    """One BatchPlan per data-parallel rank, from all samples of an optimizer step."""
    rollout_tokens: Counter[tuple[int, int]] = Counter()
    for sample in samples:
        num_loss_tokens = _num_loss_tokens(sample, options.oldest_version_in_loss)
        rollout_tokens[sample.group_id, sample.rollout_id] += num_loss_tokens
    num_tokens = rollout_tokens.total()
    num_rollouts = len(rollout_tokens)
    match options.denominator:
        case "tokens":
            denominator = max(num_tokens, 1)
        case "sequences":
            denominator = num_rollouts
        case "fixed":
            denominator = num_rollouts * options.fixed_length

    def token_weight(sample: SampleReport) -> float:
        if options.denominator != "sequences":
            return 1.0
        return 1 / max(rollout_tokens[sample.group_id, sample.rollout_id], 1)

    expert_shape = _expert_shape(samples)
    advantages = [_advantage(sample) for sample in samples]
    ranks = pack(
        [sample.num_tokens for sample in samples],
        num_ranks=options.dp_size,
        max_tokens=options.max_tokens,
        parity_tokens=options.parity_tokens,
        multiple=options.microbatch_multiple,
    )
    plans = []
    for microbatches in ranks:
        mine = [i for microbatch in microbatches for i in microbatch]
        plan = BatchPlan(
            arrays=[samples[i].arrays for i in mine],
            advantages=[advantages[i] for i in mine],
            token_weights=[token_weight(samples[i]) for i in mine],
            microbatches=_counted_from_zero(microbatches),
            denominator=float(denominator),
            num_tokens=num_tokens,
            num_sequences=len(samples),
            temperature=options.temperature,
            expert_shape=expert_shape,
            oldest_version_in_loss=options.oldest_version_in_loss,
        )
        _add_dummies(plan)
        plans.append(plan)
    return plans


def _counted_from_zero(microbatches: list[list[int]]) -> list[list[int]]:
    """Micro-batches of the same sizes whose sequences are numbered in order."""
    numbers = count()
    return [[next(numbers) for _ in microbatch] for microbatch in microbatches]


def _add_dummies(plan: BatchPlan) -> None:
    """Gives each empty micro-batch a dummy sequence, which is not in the loss."""
    for microbatch in plan.microbatches:
        if microbatch:
            continue
        microbatch.append(len(plan.arrays))
        plan.arrays.append(None)
        plan.advantages.append(0.0)
        plan.token_weights.append(0.0)


def _advantage(sample: SampleReport) -> float:
    assert sample.advantage is not None, "PolicyGradient.advantages comes before batching"
    return float(sample.advantage)


def _expert_shape(samples: list[SampleReport]) -> tuple[int, int] | None:
    """(num_moe_layers, topk) if any sample holds routed experts.

    Samples without a response may have none. Raises ValueError for another one.
    """
    shapes = [sample.expert_shape for sample in samples if sample.expert_shape is not None]
    if not shapes:
        return None
    for sample in samples:
        if sample.expert_shape is None and sample.num_response_tokens:
            raise ValueError(
                f"a sample of group {sample.group_id} lacks routed_experts, which others have"
            )
    return shapes[0]


def _routed_experts(arrays: SampleArrays, expert_shape: tuple[int, int]) -> Tensor:
    """int16 [T, *expert_shape]; -1 for the tokens that the engine did not run.

    These are the last token, and all tokens of a sample without a response.
    """
    num_tokens = len(arrays.token_ids)
    experts = torch.full((num_tokens, *expert_shape), -1, dtype=torch.int16)
    if arrays.routed_experts is not None:
        experts[:-1] = torch.tensor(arrays.routed_experts)
    return experts


def _loss_mask(arrays: SampleArrays, oldest_version: int | None) -> np.ndarray:
    """bool [T]: the sample's own mask, without tokens of older versions."""
    if oldest_version is None:
        return arrays.loss_mask
    mask = np.zeros_like(arrays.loss_mask)
    for first, end, version in arrays.spans():
        if version >= oldest_version:
            mask[first:end] = arrays.loss_mask[first:end]
    return mask
