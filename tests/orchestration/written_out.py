"""A whole run written out in plain PyTorch, from its configuration and the samples on record.

One sequence at a time, with sums and formulas in full. Of the package it uses the
configuration and the recorded samples only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from torch import Tensor

from nanoslime.config import RunConfig
from nanoslime.config.algorithm import SharedConfig
from nanoslime.types import Sample, SampleGroup

# What is compared of a step's metrics; a rollout's row has the mean over its steps, or the
# largest for names that end in "max".
Row = dict[str, float]


@dataclass
class TrainedSequence:
    """A sample as the loss sees it; tensors are [T]."""

    tokens: Tensor
    in_loss: Tensor
    engine: Tensor
    advantage: float
    group: int
    old: Tensor
    ref: Tensor
    advantages: Tensor = field(default_factory=lambda: torch.zeros(0))


class WrittenOut:
    """A policy that is trained on the recorded rollouts, one after the other."""

    def __init__(self, config: RunConfig, model_dir: Path) -> None:
        self.config = config
        self.policy = _load(model_dir)
        self.reference = _load(model_dir)
        self.optimizer_step = 0
        # First and second moment by the name of the parameter.
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}

    def logprobs(self, model: transformers.PreTrainedModel, tokens: Tensor) -> Tensor:
        return self._distributions(model, tokens)[0]

    def _distributions(
        self, model: transformers.PreTrainedModel, tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The logprob and the entropy [T] that go with each token; 0 at the first one."""
        logits = model(tokens[None]).logits[0].float() / self.config.rollout.temperature
        log_p = torch.log_softmax(logits, -1)
        chosen = log_p[:-1].gather(1, tokens[1:, None])[:, 0]
        entropies = -(log_p.exp() * log_p).sum(-1)[:-1]
        zero = torch.zeros(1)
        return torch.cat([zero, chosen]), torch.cat([zero, entropies])

    def train(self, groups: Sequence[SampleGroup]) -> Row:
        """The row of a rollout, after its optimizer steps."""
        sequences = self._sequences(groups)
        self._set_token_advantages(sequences)
        group_ids = list(dict.fromkeys(sequence.group for sequence in sequences))
        num_steps = self.config.training.num_steps_per_rollout
        rows = []
        for step in range(num_steps):
            first = len(group_ids) * step // num_steps
            last = len(group_ids) * (step + 1) // num_steps
            mine = [s for s in sequences if s.group in group_ids[first:last]]
            if mine:
                rows.append(self._train_step(mine))
        names = rows[0].keys() if rows else ()
        found = {}
        for name in names:
            values = [row[name] for row in rows]
            found[name] = max(values) if name.endswith("max") else sum(values) / len(values)
        return found

    @torch.no_grad()
    def _sequences(self, groups: Sequence[SampleGroup]) -> list[TrainedSequence]:
        found = []
        for group in groups:
            rewards = [float(sample.reward) for sample in group.samples]
            if self.config.algorithm.filter_zero_std and min(rewards) == max(rewards):
                continue
            for sample, advantage in zip(group.samples, self._advantages(group), strict=True):
                found.append(self._sequence(sample, advantage))
        return found

    def _sequence(self, sample: Sample, advantage: float) -> TrainedSequence:
        tokens = torch.tensor(sample.token_ids, dtype=torch.long)
        engine = torch.tensor(sample.rollout_logprobs)
        old = engine
        if self.config.algorithm.old_logprobs != "rollout":
            old = self.logprobs(self.policy, tokens)
        return TrainedSequence(
            tokens=tokens,
            in_loss=torch.tensor(sample.loss_mask),
            engine=engine,
            advantage=advantage,
            group=sample.group_id,
            old=old,
            ref=self.logprobs(self.reference, tokens),
        )

    def _advantages(self, group: SampleGroup) -> list[float]:
        algorithm = self.config.algorithm
        shaped = []
        for sample in group.samples:
            reward = float(sample.reward)
            if algorithm.overlong_buffer:
                start = self.config.rollout.max_new_tokens - algorithm.overlong_buffer
                over = int(sample.loss_mask.sum()) - start
                over = min(max(over, 0), algorithm.overlong_buffer)
                reward -= algorithm.overlong_penalty * over / algorithm.overlong_buffer
            shaped.append(reward)
        n = len(shaped)
        mean = sum(shaped) / n
        std = math.sqrt(sum((reward - mean) ** 2 for reward in shaped) / (n - 1))
        if std <= 1e-6:
            return [0.0] * n
        if algorithm.name == "rloo":
            return [reward - (sum(shaped) - reward) / (n - 1) for reward in shaped]
        if not algorithm.normalize_by_std:
            return [reward - mean for reward in shaped]
        return [(reward - mean) / (std + 1e-6) for reward in shaped]

    def _set_token_advantages(self, sequences: list[TrainedSequence]) -> None:
        algorithm = self.config.algorithm
        for sequence in sequences:
            kl = estimate(algorithm.kl_loss_type, sequence.old, sequence.ref)
            sequence.advantages = sequence.advantage - algorithm.kl_coef * kl
        if not algorithm.normalize_advantages:
            return
        every = torch.cat([s.advantages[s.in_loss] for s in sequences]).double()
        mean = every.mean()
        scale = (every.var() + 1e-8).sqrt()
        for sequence in sequences:
            sequence.advantages = ((sequence.advantages - mean) / scale).float()

    def _train_step(self, sequences: list[TrainedSequence]) -> Row:
        algorithm = self.config.algorithm
        num_tokens = sum(int(s.in_loss.sum()) for s in sequences)
        denominator = {
            "tokens": num_tokens,
            "sequences": len(sequences),
            "fixed": len(sequences) * self.config.rollout.max_new_tokens,
        }[algorithm.denominator]
        self.policy.zero_grad()
        sums = dict.fromkeys(("kl", "kl_loss", "entropy", "move", "gap", "clipped"), 0.0)
        largest_move = 0.0
        largest_gap = 0.0
        loss = torch.zeros(())
        policy_loss = 0.0
        for s in sequences:
            weight = 1.0
            if algorithm.denominator == "sequences":
                weight = 1 / int(s.in_loss.sum())
            logprobs, entropies = self._distributions(self.policy, s.tokens)
            new = logprobs[s.in_loss]
            entropy = entropies[s.in_loss]
            engine = s.engine[s.in_loss]
            ref = s.ref[s.in_loss]
            old = s.old[s.in_loss]
            if algorithm.old_logprobs == "current":
                old = new.detach()
            term, is_clipped = policy_term(algorithm, new - old, s.advantages[s.in_loss])
            term = weight * (term * importance(algorithm, old, engine)).sum()
            loss = loss + term - algorithm.entropy_coef * weight * entropy.sum()
            policy_loss += float(term.detach())
            if algorithm.use_kl_loss:
                kl = estimate(algorithm.kl_loss_type, new, ref)
                if algorithm.use_unbiased_kl:
                    kl = kl * (new - old).exp()
                loss = loss + algorithm.kl_loss_coef * weight * kl.sum()
                sums["kl_loss"] += weight * float(kl.detach().sum())
            sums["entropy"] += float(entropy.detach().sum())
            sums["kl"] += float(estimate("k3", new.detach(), ref).sum())
            sums["clipped"] += float(is_clipped.sum())
            move = (new.detach() - old).abs()
            sums["move"] += float(move.sum())
            largest_move = max(largest_move, float(move.max()))
            trainer = old if algorithm.old_logprobs in ("auto", "recomputed") else new.detach()
            gap = (trainer - engine).abs()
            sums["gap"] += float(gap.sum())
            largest_gap = max(largest_gap, float(gap.max()))
        loss = loss / denominator
        loss.backward()
        norm, lr = self._update()
        row = {
            "train/loss": float(loss.detach()),
            "train/policy_loss": policy_loss / denominator,
            "train/grad_norm": norm,
            "train/lr": lr,
            "train/entropy": sums["entropy"] / num_tokens,
            "train/clip_ratio": sums["clipped"] / num_tokens,
            "train/rejected_ratio": 0.0,
            "train/ppo_kl_abs": sums["move"] / num_tokens,
            "train/ppo_kl_abs_max": largest_move,
            "train/logprob_gap_mean": sums["gap"] / num_tokens,
            "train/logprob_gap_max": largest_gap,
        }
        if algorithm.kl_coef or algorithm.use_kl_loss:
            row["train/ref_kl"] = sums["kl"] / num_tokens
        if algorithm.use_kl_loss:
            row["train/kl_loss"] = sums["kl_loss"] / denominator
        return row

    @torch.no_grad()
    def _update(self) -> tuple[float, float]:
        """One step of Adam with decoupled weight decay; the gradient's norm and the lr."""
        training = self.config.training
        named = list(self.policy.named_parameters())
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for _, p in named))
        scale = 1.0
        if training.clip_grad and norm > training.clip_grad:
            scale = training.clip_grad / norm
        lr = self._lr()
        self.optimizer_step += 1
        b1, b2 = training.adam_beta1, training.adam_beta2
        for name, p in named:
            grad = p.grad * scale
            first, second = self.moments.get(name, (torch.zeros_like(p), torch.zeros_like(p)))
            first = b1 * first + (1 - b1) * grad
            second = b2 * second + (1 - b2) * grad**2
            self.moments[name] = first, second
            mean = first / (1 - b1**self.optimizer_step)
            root = (second / (1 - b2**self.optimizer_step)).sqrt()
            decay = training.weight_decay if p.dim() > 1 else 0.0
            p.sub_(lr * (mean / (root + training.adam_eps) + decay * p))
        return norm, lr

    def _lr(self) -> float:
        training = self.config.training
        step = self.optimizer_step
        if step < training.lr_warmup_steps:
            return training.lr * (step + 1) / training.lr_warmup_steps
        if training.lr_schedule == "constant":
            return training.lr
        total = self.config.rollout.num_rollout * training.num_steps_per_rollout
        done = (step - training.lr_warmup_steps) / (total - training.lr_warmup_steps)
        left = 1 - done if training.lr_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        return training.min_lr + (training.lr - training.min_lr) * left


def estimate(kind: str, logprobs: Tensor, ref: Tensor) -> Tensor:
    """The estimator of the KL of policy to reference."""
    if kind == "k1":
        return logprobs - ref
    if kind == "k2":
        return (logprobs - ref) ** 2 / 2
    return torch.exp(ref - logprobs) - (ref - logprobs) - 1


def policy_term(
    algorithm: SharedConfig, log_ratio: Tensor, advantages: Tensor
) -> tuple[Tensor, Tensor]:
    """PPO's clipped loss of each token, and where the clip decides."""
    free = log_ratio.exp() * advantages
    clipped = log_ratio.exp().clamp(1 - algorithm.eps_clip, 1 + algorithm.clip_high) * advantages
    loss = -torch.minimum(free, clipped)
    if algorithm.eps_clip_c is not None:
        limit = -algorithm.eps_clip_c * advantages
        loss = torch.where(advantages < 0, torch.minimum(loss, limit), loss)
    return loss, clipped < free


def importance(algorithm: SharedConfig, old: Tensor, engine: Tensor) -> Tensor:
    """Truncated importance sampling by token; 1 where it is off."""
    correction = algorithm.correction
    if not correction.use_tis:
        return torch.ones_like(old)
    return (old - engine).exp().clamp(correction.tis_clip_low, correction.tis_clip)


def _load(model_dir: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager"
    ).eval()
