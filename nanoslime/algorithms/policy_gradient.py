"""What all algorithms share; each adds its own advantages and its own policy term.

    rewards -> one advantage per rollout -> token advantages [T] -> a loss, summed over the tokens

The loss is the sum of token_weight x (correction x policy term + kl_loss_coef x KL -
entropy_coef x entropy).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from nanoslime.algorithms.corrections import bounded_exp, correct, off_policy_sequences
from nanoslime.algorithms.kl import approx_kl, k1, k3
from nanoslime.algorithms.rewards import ZERO_STD, overlong_penalty, relative, rewards_by_group
from nanoslime.batch import Maximum, Metric, MicroBatch, TokenMean, TrainBatch, WeightedMean
from nanoslime.config.algorithm import SharedConfig
from nanoslime.types import Group, Scored

T = TypeVar("T")

# Each token's term of the loss [T], and bool flags [T] by metric name: where the token
# was clipped.
PolicyTerms = tuple[Tensor, dict[str, Tensor]]


class PolicyGradient(ABC):
    """The base of all algorithms: maths on tensors, no I/O, no process groups.

    `max_response_length` in tokens is needed for overlong_buffer only.
    """

    def __init__(self, config: SharedConfig, max_response_length: int = 0) -> None:
        self.config = config
        self._max_response_length = max_response_length
        # A run resolves auto (RunConfig.old_logprobs); elsewhere it is what is always right.
        self.needs_old_logprobs = config.old_logprobs in ("auto", "recomputed")
        self.needs_reference = config.needs_reference

    def rollout_advantages(self, rewards: Sequence[float]) -> list[float]:
        """One advantage for each of the `rewards` of a group.

        It is the reward less the group's mean, over their standard deviation where the
        algorithm has normalize_by_std.
        """
        by_std = getattr(self.config, "normalize_by_std", False)
        return relative(rewards, by_std=by_std)

    @abstractmethod
    def policy_terms(
        self, logp: Tensor, log_ratio: Tensor, advantages: Tensor, batch: MicroBatch
    ) -> PolicyTerms:
        """Each token's term of the loss [T], and flags by metric name: see PolicyTerms.

        `log_ratio` [T] is current - old logprobs; like `logp` and `advantages` [T] it is
        0 outside the loss.
        """

    def returns(self, advantage: float, mask: Tensor, penalty: Tensor) -> Tensor:
        """[T]: the returns of one sequence from its advantage, 0 outside `mask`.

        `penalty` [T] is the KL in the reward.
        """
        return torch.where(mask, advantage - penalty, 0.0)

    def advantages[S: Scored](self, groups: Sequence[Group[S]]) -> None:
        """Sets `advantage` from the rewards of all samples with the same group_id.

        Rewards are shaped for length before. Siblings (samples with one rollout_id) count
        once, as long as the longest of them. Raises ValueError where siblings differ in
        reward, or a reward is missing or not finite.
        """
        samples = [sample for group in groups for sample in group.samples]
        lengths: dict[tuple[int, int], int] = {}
        for sample in samples:
            key = (sample.group_id, sample.rollout_id)
            lengths[key] = max(lengths.get(key, 0), sample.num_response_tokens)
        config = self.config
        overlong = (self._max_response_length, config.overlong_buffer, config.overlong_penalty)
        found: dict[tuple[int, int], float] = {}
        for group_id, rewards in rewards_by_group(groups).items():
            shaped = [
                reward + overlong_penalty(lengths[group_id, rollout_id], *overlong)
                for rollout_id, reward in rewards.items()
            ]
            advantages = self.rollout_advantages(shaped)
            for rollout_id, advantage in zip(rewards, advantages, strict=True):
                found[group_id, rollout_id] = advantage
        for sample in samples:
            sample.advantage = found[sample.group_id, sample.rollout_id]

    def token_advantages(
        self, shard: TrainBatch, all_sum: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """float32 [T_i] per sequence of a rollout: its returns.

        They are whitened if normalize_advantages says so. From the returns, kl_coef times
        the KL of old policy to reference is taken off. They are zero where loss_mask is
        False. With kl_coef > 0 this needs shard.ref_logprobs, and shard.old_logprobs
        unless the rollout's logprobs serve as the old ones; it raises ValueError without
        them. `all_sum` sums a tensor over the data-parallel ranks and is called equally
        often whatever the shard.
        """
        masks = shard.loss_mask
        penalties = self._kl_penalties(shard)
        found = [
            self.returns(advantage, mask, penalty)
            for advantage, mask, penalty in zip(shard.advantages, masks, penalties, strict=True)
        ]
        if self.config.normalize_advantages:
            return whitened(found, masks, all_sum)
        return found

    def _kl_penalties(self, shard: TrainBatch) -> list[Tensor]:
        """[T_i] per sequence: kl_coef x KL(old policy || reference), 0 outside the loss."""
        config = self.config
        masks = shard.loss_mask
        if not config.kl_coef:
            return [torch.zeros(len(mask)) for mask in masks]
        olds = self._old(shard.rollout_logprobs, shard.old_logprobs)
        refs = self._present(shard.ref_logprobs, "ref_logprobs")
        penalties = []
        for old, ref, mask in zip(olds, refs, masks, strict=True):
            kl = approx_kl(_in_loss(old, mask), _in_loss(ref, mask), config.kl_loss_type)
            penalties.append(config.kl_coef * kl)
        return penalties

    def loss(
        self, logprobs: Tensor, entropy: Tensor, batch: MicroBatch
    ) -> tuple[Tensor, dict[str, Metric]]:
        """The loss of `batch`, a sum over tokens times their token_weights, and its
        metrics.

        Divided by batch.denominator, and summed over all micro-batches, it is the mean
        that the denominator names. Tokens with loss_mask False contribute exactly
        nothing, whatever their logprobs. `logprobs`, `entropy` [T]. Raises ValueError
        where the batch lacks logprobs that the configuration needs.
        """
        config = self.config
        mask = batch.loss_mask
        num_tokens = mask.sum()
        logprobs = _in_loss(logprobs, mask)
        advantages = _in_loss(batch.advantages, mask)
        old = logprobs.detach()
        if config.old_logprobs != "current":
            old = _in_loss(self._old(batch.rollout_logprobs, batch.old_logprobs), mask)
        log_ratio = logprobs - old

        terms, flags = self.policy_terms(logprobs, log_ratio, advantages, batch)
        engine = _in_loss(batch.rollout_logprobs, mask)
        correction = correct(config.correction, old, engine, mask, batch.cu_seqlens)
        flags = flags | correction.flags
        policy_weight = correction.weight
        if config.correction.use_opsm:
            since_sampled = logprobs.detach() - engine
            off_policy = off_policy_sequences(
                since_sampled, advantages, mask, batch.cu_seqlens, config.correction.opsm_delta
            )
            flags["opsm_ratio"] = off_policy
            policy_weight = torch.where(off_policy, 0.0, policy_weight)

        token_weights = torch.where(mask & correction.keep, batch.token_weights, 0.0)
        total = (terms * policy_weight * token_weights).sum()
        entropy = _in_loss(entropy, mask)
        ppo_kl = k1(old, logprobs.detach())
        metrics: dict[str, Metric] = {
            "train/policy_loss": WeightedMean(total.detach(), batch.denominator),
            "train/entropy": TokenMean(entropy.detach().sum(), num_tokens),
            "train/ppo_kl_k1": TokenMean(ppo_kl.sum(), num_tokens),
            "train/ppo_kl_abs": TokenMean(ppo_kl.abs().sum(), num_tokens),
            "train/ppo_kl_abs_max": Maximum(ppo_kl.abs().max()),
        }
        for name, flag in flags.items():
            metrics[f"train/{name}"] = TokenMean((flag & mask).sum(), num_tokens)

        if self.needs_reference:
            ref = _in_loss(self._present(batch.ref_logprobs, "ref_logprobs"), mask)
            metrics["train/ref_kl"] = TokenMean(k3(logprobs.detach(), ref).sum(), num_tokens)
            if config.use_kl_loss:
                ratio = bounded_exp(log_ratio) if config.use_unbiased_kl else None
                kl_terms = approx_kl(logprobs, ref, config.kl_loss_type, ratio)
                kl_loss = (kl_terms * token_weights).sum()
                metrics["train/kl_loss"] = WeightedMean(kl_loss.detach(), batch.denominator)
                total = total + config.kl_loss_coef * kl_loss
        if config.entropy_coef:
            total = total - config.entropy_coef * (entropy * token_weights).sum()
        return total, metrics

    def _old(self, rollout: T, recomputed: T | None) -> T:
        """The old policy's logprobs: the rollout's, or those that the trainer recomputed."""
        if self.config.old_logprobs == "rollout":
            return rollout
        return self._present(recomputed, "old_logprobs")

    def _present(self, values: T | None, name: str) -> T:
        if values is None:
            raise ValueError(f"the batch has no {name}, which {self.config} needs")
        return values


def clip_flags(low: Tensor, high: Tensor) -> dict[str, Tensor]:
    """The flags of tokens that a clip holds at its lower and at its upper limit; bool [T]."""
    return {"clip_ratio": low | high, "clip_low_ratio": low, "clip_high_ratio": high}


def whitened(
    values: Sequence[Tensor], masks: Sequence[Tensor], all_sum: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """(x - mean) / sqrt(var + 1e-8) over the tokens with `masks` on all ranks, 0
    elsewhere.

    var is unbiased. Statistics are taken over the whole rollout, as in arXiv 2501.03262,
    in float64 and in two passes. The result is exactly zero where all values are equal.
    `values`, `masks`: [T_i] per sequence.
    """
    per_sequence = [value[mask] for value, mask in zip(values, masks, strict=True)]
    mine = torch.cat(per_sequence).double()
    my_count = torch.tensor(float(len(mine)), dtype=torch.float64)
    total, count = all_sum(torch.stack([mine.sum(), my_count]))
    mean = total / count.clamp(min=1)
    squares = all_sum((mine - mean).square().sum())
    variance = squares / (count - 1).clamp(min=1)
    scale = torch.zeros_like(variance)
    if variance.sqrt() > ZERO_STD:
        scale = (variance + 1e-8).rsqrt()
    found = []
    for value, mask in zip(values, masks, strict=True):
        whitened_value = (value.double() - mean) * scale
        found.append(torch.where(mask, whitened_value, 0.0).float())
    return found


def _in_loss(values: Tensor, mask: Tensor) -> Tensor:
    """Zero outside the loss, before any exp: a masked inf or NaN must reach neither value
    nor gradient.
    """
    return torch.where(mask, values, 0.0)
