"""The parity problem, and its solution in plain PyTorch.

The solution uses transformers, one sequence at a time, in one process.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nanoslime import algorithms
from nanoslime.batch import Maximum, Minimum, StepMetrics, TokenMean, WeightedMean
from tests.training.parity import LENGTHS, TEMPERATURE, Layout, Outcome, train_batch

PROMPT_LENGTHS = [3, 2, 6, 1, 4, 5, 3, 2]
# Two ways of computing scores of up to 1 differ by some 1e-7 in float32.
LEAST_GAP = 1e-5
CLIP_RANGES = {
    "grpo": (0.8, 1.2),
    "gspo": (0.9, 1.1),
    "cispo": (0.0, 1.2),
    "reinforce_plus_plus": (0.8, 1.2),
}


def make_step(model_dir: Path, step: int) -> dict[str, Any]:
    """The global batch of optimizer step `step`.

    Lengths are unequal, masks are random after each prompt, and one sequence is masked
    out whole. Ratios of the first step's policy stay 1e-2 away from the edges of the
    clip range (0.8, 1.2).
    """
    generator = torch.Generator().manual_seed(100 + step)

    def draw(n: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    tokens = [torch.randint(0, 250, (n,), generator=generator) for n in LENGTHS]
    masks = [torch.rand(n, generator=generator) < 0.7 for n in LENGTHS]
    for mask, prompt_length in zip(masks, PROMPT_LENGTHS, strict=True):
        mask[:prompt_length] = False
    masks[6][:] = False
    policy = sequence_logprobs(load_hf(model_dir), tokens)
    # The logarithm of the ratio of new to old probability lies far below the clip
    # range, well inside it, or far above it.
    kinds = [torch.randint(0, 3, (n,), generator=generator) for n in LENGTHS]
    centres = torch.tensor([-0.5, 0.0, 0.5])
    log_ratios = [centres[kind] + draw(len(kind), -0.1, 0.1) for kind in kinds]
    old = [(p - log_ratio).detach() for p, log_ratio in zip(policy, log_ratios, strict=True)]
    ref = [(p + draw(len(p), -0.5, 0.5)).detach() for p in policy]
    rollout = [(p + draw(len(p), -0.5, 0.5)).detach() for p in policy]
    advantages = draw(len(LENGTHS), -2.0, 2.0)
    token_weights = 0.5 + draw(len(LENGTHS), 0.0, 1.0)
    return {
        "token_ids": tokens,
        "loss_mask": masks,
        "old_logprobs": old,
        "ref_logprobs": ref,
        "rollout_logprobs": rollout,
        "advantages": advantages.tolist(),
        "token_weights": token_weights.tolist(),
    }


def load_hf(model_dir: Path) -> transformers.PreTrainedModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    return model.eval()


def sequence_logprobs(model: transformers.PreTrainedModel, tokens: list[Tensor]) -> list[Tensor]:
    """Logprob of each token given the tokens before it; 0 at a sequence's first token."""
    found = []
    for ids in tokens:
        logits = model(ids[None]).logits[0].float() / TEMPERATURE
        log_p = torch.log_softmax(logits, dim=-1)
        of_next = log_p[:-1].gather(1, ids[1:, None]).squeeze(1)
        found.append(torch.cat([torch.zeros(1), of_next]))
    return found


@torch.no_grad()
def sequence_entropies(model: transformers.PreTrainedModel, tokens: list[Tensor]) -> list[Tensor]:
    """Entropy of the distribution that each token was drawn from; 0 at the first token."""
    found = []
    for ids in tokens:
        logits = model(ids[None]).logits[0].float() / TEMPERATURE
        entropies = torch.distributions.Categorical(logits=logits[:-1]).entropy()
        found.append(torch.cat([torch.zeros(1), entropies]))
    return found


def written_out(algorithm: str, step: dict[str, Any], logprobs: list[Tensor]) -> Tensor:
    """The loss of parity.ALGORITHMS: a weighted mean of clipped policy losses.

    0.1 k3 to the reference is added in the loss, or subtracted from the reward.
    """
    returns = whitened_returns(step)
    total = torch.zeros(())
    for i, new in enumerate(logprobs):
        mask = step["loss_mask"][i]
        if not mask.any():
            continue
        log_ratio = new - step["old_logprobs"][i]
        if algorithm == "gspo":
            ratio = log_ratio[mask].mean().exp()
        else:
            ratio = log_ratio.exp()
        clipped = ratio.clamp(*CLIP_RANGES[algorithm])
        advantage = step["advantages"][i]
        if algorithm == "reinforce_plus_plus":
            advantage = returns[i]
        if algorithm == "cispo":
            losses = -clipped.detach() * advantage * new
        else:
            losses = -torch.minimum(ratio * advantage, clipped * advantage).expand_as(new)
        if algorithm != "reinforce_plus_plus":
            losses = losses + 0.1 * k3(new, step["ref_logprobs"][i])
        total = total + losses[mask].sum() * step["token_weights"][i]
    return total / train_batch(step).denominator


class Closest(TorchFunctionMode):
    """Inside, `gap` becomes the least distance of scores on either side of a torch.topk."""

    gap = math.inf

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.topk, Tensor.topk):
            scores = args[0].detach()
            k = kwargs["k"] if "k" in kwargs else args[1]
            ordered = scores.sort(dim=-1, descending=True).values
            if ordered.shape[-1] > k:
                gaps = ordered[..., k - 1] - ordered[..., k]
                self.gap = min(self.gap, float(gaps.min()))
        return func(*args, **kwargs)


def k3(logprobs: Tensor, ref: Tensor) -> Tensor:
    return torch.exp(ref - logprobs) - 1 - (ref - logprobs)


def whitened_returns(step: dict[str, Any], gamma: float = 0.98) -> list[Tensor]:
    """REINFORCE++'s advantages [T]: the reward comes with the last token of the loss."""
    found = []
    for i, mask in enumerate(step["loss_mask"]):
        penalty = 0.1 * k3(step["old_logprobs"][i], step["ref_logprobs"][i])
        returns = torch.zeros(len(mask), dtype=torch.float64)
        reward = step["advantages"][i]
        value = 0.0
        for t in reversed(range(len(mask))):
            value *= gamma
            if mask[t]:
                value += reward - float(penalty[t])
                reward = 0.0
            returns[t] = value
        found.append(returns)
    in_loss = [returns[mask] for returns, mask in zip(found, step["loss_mask"], strict=True)]
    every = torch.cat(in_loss)
    std = (every.var() + 1e-8).sqrt()
    return [((returns - every.mean()) / std).float() for returns in found]


def reference(model_dir: Path, steps: list[dict[str, Any]], name: str = "grpo") -> Outcome:
    """Trains by the algorithm `name` on `steps`.

    It may take a few tokens out of their masks: see _stay_clear_of_clip_edges. It
    asserts that no token is so near a tie between experts that rounding could send it
    to another one.
    """
    torch.manual_seed(0)
    model = load_hf(model_dir)
    config = Layout(algorithm=name).config()
    training = config.training
    algorithm = algorithms.make(config.algorithm)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": training.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_eps,
    )
    initial = sequence_logprobs(model, steps[0]["token_ids"])
    outcome = Outcome(logprobs=[logprobs.detach() for logprobs in initial])
    for number, step in enumerate(steps):
        lr = training.lr + (training.min_lr - training.lr) * number / config.rollout.num_rollout
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        with Closest() as closest:
            logprobs = sequence_logprobs(model, step["token_ids"])
        assert closest.gap > LEAST_GAP, (
            f"step {number}: the scores of two experts differ by {closest.gap:.1e} only"
        )
        entropies = sequence_entropies(model, step["token_ids"])
        _stay_clear_of_clip_edges(name, step, logprobs)
        loss = written_out(name, step, logprobs)
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_grad))
        grads = ((name, p.grad.clone()) for name, p in model.named_parameters())
        outcome.grads.append(as_in_files(grads))
        optimizer.step()
        means, maxima, minima = _metrics(step, logprobs, entropies, algorithm)
        metrics = StepMetrics(
            loss=float(loss.detach()),
            grad_norm=norm,
            lr=lr,
            skipped=False,
            means=means,
            maxima=maxima,
            minima=minima,
        )
        outcome.steps.append(metrics)
    outcome.params = as_in_files(_weights(model))
    return outcome


def _weights(model: transformers.PreTrainedModel) -> list[tuple[str, Tensor]]:
    """Copies of the parameters and of the buffers with biases of the experts' scores."""
    found = [(name, p.detach().clone()) for name, p in model.named_parameters()]
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            found.append((name, buffer.clone()))
    return found


def as_in_files(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Experts one by one, as checkpoints have them.

    transformers 5 holds the experts of a layer in two tensors.
    """
    found = {}
    for name, tensor in tensors:
        block, _, matrix = name.rpartition(".")
        if not block.endswith(".experts"):
            found[name] = tensor
            continue
        for number, expert in enumerate(tensor):
            if matrix == "gate_up_proj":
                gate, up = expert.chunk(2)
                found[f"{block}.{number}.gate_proj.weight"] = gate
                found[f"{block}.{number}.up_proj.weight"] = up
            else:
                found[f"{block}.{number}.{matrix}.weight"] = expert
    return found


def _stay_clear_of_clip_edges(name: str, step: dict[str, Any], logprobs: list[Tensor]) -> None:
    """Takes tokens out of the loss whose ratio is at an edge of the clip range.

    Rounding could move such a ratio to either side of the edge, where its gradient
    differs.
    """
    edges = torch.tensor(CLIP_RANGES[name])
    for new, old, mask in zip(logprobs, step["old_logprobs"], step["loss_mask"], strict=True):
        log_ratio = new.detach() - old
        if name == "gspo":
            while _at_edge(log_ratio[mask].mean().exp(), edges):
                first = mask.nonzero()[0]
                mask[first] = False
        else:
            mask &= ~_at_edge(log_ratio.exp(), edges)


def _at_edge(ratio: Tensor, edges: Tensor) -> Tensor:
    return ((ratio[..., None] - edges).abs() <= 1e-3).any(-1)


def _metrics(
    step: dict[str, Any], logprobs: list[Tensor], entropies: list[Tensor], algorithm: Any
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Means, maxima and minima over the whole batch at once."""
    batch = train_batch(step)
    batch.token_advantages = algorithm.token_advantages(batch, lambda value: value)
    whole = batch.microbatch(range(len(LENGTHS)))
    _, metrics = algorithm.loss(torch.cat(logprobs).detach(), torch.cat(entropies), whole)
    means: dict[str, float] = {}
    maxima: dict[str, float] = {}
    minima: dict[str, float] = {}
    for name, metric in metrics.items():
        match metric:
            case WeightedMean():
                means[name] = float(metric.total) / batch.denominator
            case TokenMean():
                means[name] = float(metric.total) / batch.num_tokens
            case Maximum():
                maxima[name] = float(metric.value)
            case Minimum():
                minima[name] = float(metric.value)
    mask = whole.loss_mask
    moved = (torch.cat(step["old_logprobs"]) - torch.cat(logprobs).detach())[mask].double()
    means["train/entropy"] = float(torch.cat(entropies)[mask].double().mean())
    means["train/ppo_kl_k1"] = float(moved.mean())
    advantages = torch.cat(batch.token_advantages)[mask].double()
    means["train/advantage_mean"] = float(advantages.mean())
    means["train/advantage_std"] = float(advantages.std(correction=0))
    means["train/advantage_zero_ratio"] = float((advantages == 0).double().mean())
    maxima["train/advantage_max"] = float(advantages.max())
    minima["train/advantage_min"] = float(advantages.min())
    gap = (torch.cat(step["old_logprobs"]) - whole.rollout_logprobs)[mask].double()
    ratio = gap.exp()
    maxima["train/logprob_gap_max"] = float(gap.abs().max())
    means["train/logprob_gap_mean"] = float(gap.abs().mean())
    means["train/rollout_kl"] = float((ratio - 1 - gap).mean())
    means["train/rollout_kl_k1"] = float(-gap.mean())
    means["train/importance_weight_mean"] = float(ratio.mean())
    means["train/ess_ratio"] = float(ratio.sum() ** 2 / (len(ratio) * ratio.square().sum()))
    return means, maxima, minima
