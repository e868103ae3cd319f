"""Group-relative policy optimization (arXiv 2402.03300) and the variants that differ from it by a switch."""

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from nanoslime.algorithms.kl import approx_kl, k3
from nanoslime.batch import MicroBatch, TrainBatch
from nanoslime.config.algorithm import GRPOConfig
from nanoslime.types import SampleGroup

T = TypeVar("T")

ZERO_STD = 1e-6  # rewards that spread no more than this count as equal


class GRPO:
    needs_entropy = False

    def __init__(self, config: GRPOConfig) -> None:
        self.config = config
        self.denominator: Literal["tokens", "sequences"] = config.denominator
        self.needs_old_logprobs = not config.use_rollout_logprobs
        self.needs_reference = config.needs_reference

    def advantages(self, groups: Sequence[SampleGroup]) -> None:
        """Sets Sample.advantage: the reward relative to those of all samples with the same group_id.

        Siblings (one rollout_id) count once. Raises ValueError where siblings differ in reward, or a reward
        is missing or not finite.
        """
        relative: dict[tuple[int, int], float] = {}
        for group_id, of_group in rewards_by_group(groups).items():
            values = group_advantages(list(of_group.values()), self.config.normalize_by_std)
            relative.update(zip([(group_id, rollout_id) for rollout_id in of_group], values, strict=True))
        for group in groups:
            for sample in group.samples:
                sample.advantage = relative[sample.group_id, sample.rollout_id]

    def token_advantages(self, shard: TrainBatch, all_sum: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """[T_i] float32 per sequence: its advantage, less kl_coef times the KL of old policy to reference.

        Zero where loss_mask is False. Needs shard.ref_logprobs, and shard.old_logprobs unless the rollout's
        serve, when kl_coef > 0; raises ValueError without them.
        """
        masks = shard.loss_mask
        spread = [torch.where(mask, a, 0.0) for mask, a in zip(masks, shard.advantages, strict=True)]
        if not self.config.kl_coef:
            return spread
        old = self._old(shard.rollout_logprobs, shard.old_logprobs)
        ref = _present(shard.ref_logprobs, "ref_logprobs")
        kls = [
            approx_kl(_in_loss(o, mask), _in_loss(r, mask), self.config.kl_loss_type)
            for o, r, mask in zip(old, ref, masks, strict=True)
        ]
        return [advantages - self.config.kl_coef * kl for advantages, kl in zip(spread, kls, strict=True)]

    def loss(
        self, logprobs: Tensor, entropy: Tensor | None, batch: MicroBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The clipped policy loss of `batch`, plus kl_loss_coef times the KL loss: a sum over its tokens.

        Each token's term is weighted by token_weights; divided by batch.denominator over all micro-batches it
        is the mean over tokens or over sequences. Tokens with loss_mask False contribute exactly nothing,
        whatever their logprobs. `logprobs` [T]. Metrics are sums of the same weights; a name with "max:"
        before it is a maximum.
        """
        mask, weights = batch.loss_mask, torch.where(batch.loss_mask, batch.token_weights, 0.0)
        logprobs = _in_loss(logprobs, mask)
        log_ratio = logprobs - _in_loss(self._old(batch.rollout_logprobs, batch.old_logprobs), mask)
        ratio = log_ratio.exp()
        policy, clipped = clipped_policy_loss(
            ratio, _in_loss(batch.advantages, mask), self.config.eps_clip, self.config.eps_clip_high
        )
        total = (policy * weights).sum()
        metrics = {
            "train/policy_loss": total.detach(),
            "train/clip_ratio": (clipped * weights).sum(),
            "train/ppo_kl_abs": (log_ratio.detach().abs() * weights).sum(),
            "max:train/ppo_kl_abs_max": log_ratio.detach().abs().max(),
        }
        if self.needs_reference:
            ref = _in_loss(_present(batch.ref_logprobs, "ref_logprobs"), mask)
            metrics["train/ref_kl"] = (k3(logprobs.detach(), ref) * weights).sum()
            if self.config.use_kl_loss:
                importance = ratio if self.config.use_unbiased_kl else None
                kl = (approx_kl(logprobs, ref, self.config.kl_loss_type, importance) * weights).sum()
                metrics["train/kl_loss"] = kl.detach()
                total = total + self.config.kl_loss_coef * kl
        return total, metrics

    def _old(self, rollout: T, recomputed: T | None) -> T:
        return rollout if self.config.use_rollout_logprobs else _present(recomputed, "old_logprobs")


def rewards_by_group(groups: Sequence[SampleGroup]) -> dict[int, dict[int, float]]:
    """{group_id: {rollout_id: reward}}, also where a group_id is spread over several SampleGroups.

    Raises ValueError where siblings of one rollout differ in reward, or a reward is missing or not finite.
    """
    found: dict[int, dict[int, float]] = {}
    for group in groups:
        for sample, reward in zip(group.samples, group.rewards, strict=True):
            where = f"group {sample.group_id}, rollout {sample.rollout_id}"
            if not np.isfinite(reward):
                raise ValueError(f"{where}: reward {reward} is not finite")
            if found.setdefault(sample.group_id, {}).setdefault(sample.rollout_id, reward) != reward:
                raise ValueError(f"{where}: siblings of one rollout must share one reward, and differ")
    return found


def group_advantages(rewards: Sequence[float], normalize_by_std: bool) -> list[float]:
    """(r - mean) / (std + 1e-6), std unbiased (arXiv 2402.03300, section 4.1.2), or r - mean (2503.20783).

    Float64; exactly zero for a group of one or of equal rewards.
    """
    if not spreads(rewards):
        return [0.0] * len(rewards)
    values = np.asarray(rewards, dtype=np.float64)
    centred = values - values.mean()
    return (centred / (values.std(ddof=1) + 1e-6) if normalize_by_std else centred).tolist()


def spreads(rewards: Sequence[float]) -> bool:
    """Whether the rewards of a group differ, so that they say anything about its samples."""
    return len(rewards) > 1 and float(np.std(np.asarray(rewards, dtype=np.float64), ddof=1)) > ZERO_STD


def clipped_policy_loss(
    ratio: Tensor, advantages: Tensor, eps_low: float, eps_high: float | None
) -> tuple[Tensor, Tensor]:
    """max(-ratio A, -clip(ratio, 1 - eps_low, 1 + eps_high) A), and where the clip decides (bool); all [T].

    arXiv 1707.06347, equation 7; eps_high other than eps_low is clip-higher, arXiv 2503.14476, equation 10.
    """
    high = eps_low if eps_high is None else eps_high
    plain, clipped = -ratio * advantages, -ratio.clamp(1 - eps_low, 1 + high) * advantages
    return torch.maximum(plain, clipped), clipped > plain


def _in_loss(values: Tensor, mask: Tensor) -> Tensor:
    """Zero outside the loss, before any exp: a masked inf or NaN must reach neither value nor gradient."""
    return torch.where(mask, values, 0.0)


def _present(values: T | None, name: str) -> T:
    if values is None:
        raise ValueError(f"the batch has no {name}; this configuration of GRPO needs them before the step")
    return values
