"""What the algorithms have in common; each fills in its own advantages and its own policy term.

rewards -> one advantage per rollout -> token advantages [T] -> a loss, summed over the tokens:

sum of token_weight x (correction x policy term + kl_loss_coef x KL - entropy_coef x entropy)
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor

from nanoslime.algorithms.corrections import bounded_exp, correct, drifted
from nanoslime.algorithms.kl import approx_kl, k3
from nanoslime.algorithms.rewards import ZERO_STD, overlong_penalty, relative, rewards_by_group
from nanoslime.batch import MicroBatch, TrainBatch
from nanoslime.config.algorithm import SharedConfig
from nanoslime.types import SampleGroup

T = TypeVar("T")
Terms = tuple[Tensor, dict[str, Tensor]]


class PolicyGradient(ABC):
    """Satisfies nanoslime.training.backend.Algorithm. `max_response_length` is for overlong_buffer."""

    def __init__(self, config: SharedConfig, max_response_length: int = 0) -> None:
        self.config, self._max_response_length = config, max_response_length
        self.denominator: Literal["tokens", "sequences", "fixed"] = config.denominator
        self.needs_old_logprobs = config.old_logprobs == "recomputed"
        self.needs_reference = config.needs_reference
        self.needs_entropy = config.entropy_coef > 0

    def rollout_advantages(self, rewards: Sequence[float]) -> list[float]:
        """One advantage for each of the `rewards` of a group: the reward less their mean, over their standard
        deviation where the algorithm has normalize_by_std."""
        return relative(rewards, by_std=getattr(self.config, "normalize_by_std", False))

    @abstractmethod
    def policy_terms(
        self, logp: Tensor, log_ratio: Tensor, advantages: Tensor, batch: MicroBatch
    ) -> Terms:
        """Each token's term of the loss [T], and by metric name where it was clipped (bool [T]).

        `log_ratio` [T] is current - old logprobs; like the other two it is 0 outside the loss.
        """

    def returns(self, advantage: float, mask: Tensor, penalty: Tensor) -> Tensor:
        """[T] of one sequence from its advantage; `penalty` [T] is the KL in the reward. 0 outside `mask`."""
        return torch.where(mask, advantage - penalty, 0.0)

    def advantages(self, groups: Sequence[SampleGroup]) -> None:
        """Sets Sample.advantage from the rewards of all samples with the same group_id, shaped for length.

        Siblings (one rollout_id) count once, as long as the longest. Raises ValueError where siblings differ
        in reward, or a reward is missing or not finite.
        """
        samples = [s for group in groups for s in group.samples]
        lengths, found = dict[tuple[int, int], int](), dict[tuple[int, int], float]()
        for s in samples:
            key = s.group_id, s.rollout_id
            lengths[key] = max(lengths.get(key, 0), s.num_response_tokens)
        c, longest = self.config, self._max_response_length
        for group_id, rewards in rewards_by_group(groups).items():
            if c.overlong_buffer:
                limits = longest, c.overlong_buffer, c.overlong_penalty
                rewards = {
                    i: r + overlong_penalty(lengths[group_id, i], *limits)
                    for i, r in rewards.items()
                }
            advantages = self.rollout_advantages(list(rewards.values()))
            found |= {(group_id, i): a for i, a in zip(rewards, advantages, strict=True)}
        for s in samples:
            s.advantage = found[s.group_id, s.rollout_id]

    def token_advantages(
        self, shard: TrainBatch, all_sum: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """[T_i] float32 per sequence of a rollout: its returns, with kl_coef times the KL of old policy to
        reference taken off, whitened where that is asked for. Zero where loss_mask is False.

        Needs shard.ref_logprobs, and shard.old_logprobs unless the rollout's serve, when kl_coef > 0; raises
        ValueError without them. `all_sum` is called equally often whatever the shard.
        """
        c, masks = self.config, shard.loss_mask
        penalties = [torch.zeros(len(mask)) for mask in masks]
        if c.kl_coef:
            old = self._old(shard.rollout_logprobs, shard.old_logprobs)
            ref = self._present(shard.ref_logprobs, "ref_logprobs")
            penalties = [
                c.kl_coef * approx_kl(_in_loss(o, mask), _in_loss(r, mask), c.kl_loss_type)
                for o, r, mask in zip(old, ref, masks, strict=True)
            ]
        found = [self.returns(*one) for one in zip(shard.advantages, masks, penalties, strict=True)]
        return whitened(found, masks, all_sum) if c.normalize_advantages else found

    def loss(self, logprobs: Tensor, entropy: Tensor | None, batch: MicroBatch) -> Terms:
        """The loss of `batch`, a sum over its tokens, each weighted by token_weights.

        Divided by batch.denominator over all micro-batches it is the mean that the denominator names. Tokens
        with loss_mask False contribute exactly nothing, whatever their logprobs. `logprobs` [T], `entropy`
        [T] or None. Metrics are sums weighted like the loss; "mean:" before a name says a sum over the
        tokens of the loss, unweighted, "max:" a maximum.
        """
        c, mask, bounds = self.config, batch.loss_mask, batch.cu_seqlens
        logprobs, advantages = _in_loss(logprobs, mask), _in_loss(batch.advantages, mask)
        old = logprobs.detach()
        if c.old_logprobs != "current":
            old = _in_loss(self._old(batch.rollout_logprobs, batch.old_logprobs), mask)
        log_ratio = logprobs - old
        moved = log_ratio.detach()
        engine = _in_loss(batch.rollout_logprobs, mask)
        correction, keep, corrected = correct(c.correction, old, engine, mask, bounds)
        weights = torch.where(mask & keep, batch.token_weights, 0.0)
        terms, shares = self.policy_terms(logprobs, log_ratio, advantages, batch)
        shares |= corrected
        if c.correction.use_opsm:
            shares["opsm_ratio"] = drifted(moved, advantages, mask, bounds, c.correction.opsm_delta)
            correction = torch.where(shares["opsm_ratio"], 0.0, correction)
        total = (terms * correction * weights).sum()
        metrics = {
            "train/policy_loss": total.detach(),
            "mean:train/ppo_kl_abs": moved.abs().sum(),
            "max:train/ppo_kl_abs_max": moved.abs().max(),
            **{f"mean:train/{name}": (where & mask).sum() for name, where in shares.items()},
        }
        if self.needs_reference:
            ref = _in_loss(self._present(batch.ref_logprobs, "ref_logprobs"), mask)
            metrics["mean:train/ref_kl"] = k3(logprobs.detach(), ref).sum()
            if c.use_kl_loss:
                ratio = bounded_exp(log_ratio) if c.use_unbiased_kl else None
                kl = (approx_kl(logprobs, ref, c.kl_loss_type, ratio) * weights).sum()
                metrics["train/kl_loss"] = kl.detach()
                total = total + c.kl_loss_coef * kl
        if self.needs_entropy:
            entropy = _in_loss(self._present(entropy, "entropy"), mask)
            metrics["mean:train/entropy"] = entropy.detach().sum()
            total = total - c.entropy_coef * (entropy * weights).sum()
        return total, metrics

    def _old(self, rollout: T, recomputed: T | None) -> T:
        return (
            rollout
            if self.config.old_logprobs == "rollout"
            else self._present(recomputed, "old_logprobs")
        )

    def _present(self, values: T | None, name: str) -> T:
        if values is None:
            raise ValueError(f"the batch has no {name}, which {self.config} needs")
        return values


def whitened(
    values: Sequence[Tensor], masks: Sequence[Tensor], all_sum: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """(x - mean) / sqrt(var + 1e-8), var unbiased, over all tokens with `masks` on all ranks; 0 elsewhere.

    Of the whole rollout, as in arXiv 2501.03262. Float64, in two passes; exactly zero where nothing spreads.
    """
    mine = torch.cat([x[mask] for x, mask in zip(values, masks, strict=True)]).double()
    total, count = all_sum(
        torch.stack([mine.sum(), torch.tensor(float(len(mine)), dtype=torch.float64)])
    )
    mean = total / count.clamp(min=1)
    variance = all_sum((mine - mean).square().sum()) / (count - 1).clamp(min=1)
    scale = (variance + 1e-8).rsqrt() if variance.sqrt() > ZERO_STD else 0.0
    pairs = zip(values, masks, strict=True)
    return [torch.where(mask, (x.double() - mean) * scale, 0.0).float() for x, mask in pairs]


def _in_loss(values: Tensor, mask: Tensor) -> Tensor:
    """Zero outside the loss, before any exp: a masked inf or NaN must reach neither value nor gradient."""
    return torch.where(mask, values, 0.0)
