"""The parity problem, and its solution in plain PyTorch: transformers, one sequence at a time, one
process.
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
from nanoslime.batch import Maximum, StepMetrics, TokenMean, WeightedMean
from tests.training.parity import LENGTHS, TEMPERATURE, Layout, Outcome, train_batch

TIE = 1e-5  # float32 makes scores of up to 1 differ by some 1e-7 between two ways of computing them
CLIP = {
    "grpo": (0.8, 1.2),
    "gspo": (0.9, 1.1),
    "cispo": (0.0, 1.2),
    "reinforce_plus_plus": (0.8, 1.2),
}


def make_step(model_dir: Path, step: int) -> dict[str, Any]:
    """The global batch of optimizer step `step`: unequal lengths, random masks after each prompt, one
    sequence masked out whole. Ratios of the first step's policy stay 1e-2 away from the edges of the clip
    range (0.8, 1.2).
    """
    generator = torch.Generator().manual_seed(100 + step)

    def draw(n: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    tokens = [torch.randint(0, 250, (n,), generator=generator) for n in LENGTHS]
    masks = [torch.rand(n, generator=generator) < 0.7 for n in LENGTHS]
    for mask, prompt in zip(masks, [3, 2, 6, 1, 4, 5, 3, 2], strict=True):
        mask[:prompt] = False
    masks[6][:] = False
    policy = sequence_logprobs(load_hf(model_dir), tokens)
    # log of old / new probability: far outside, well inside, and far outside the range on the other side
    kinds = [torch.randint(0, 3, (n,), generator=generator) for n in LENGTHS]
    shift = [torch.tensor([-0.5, 0.0, 0.5])[kind] + draw(len(kind), -0.1, 0.1) for kind in kinds]
    return dict(
        token_ids=tokens,
        loss_mask=masks,
        old_logprobs=[(p - s).detach() for p, s in zip(policy, shift, strict=True)],
        ref_logprobs=[(p + draw(len(p), -0.5, 0.5)).detach() for p in policy],
        rollout_logprobs=[(p + draw(len(p), -0.5, 0.5)).detach() for p in policy],
        advantages=draw(len(LENGTHS), -2.0, 2.0).tolist(),
        token_weights=(0.5 + draw(len(LENGTHS), 0.0, 1.0)).tolist(),
    )


def load_hf(model_dir: Path) -> transformers.PreTrainedModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    return model.eval()


def sequence_logprobs(model: transformers.PreTrainedModel, tokens: list[Tensor]) -> list[Tensor]:
    """Logprob of each token given those before it, one sequence at a time; 0 at the first."""
    found = []
    for ids in tokens:
        log_p = torch.log_softmax(model(ids[None]).logits[0].float() / TEMPERATURE, dim=-1)
        found.append(torch.cat([torch.zeros(1), log_p[:-1].gather(1, ids[1:, None]).squeeze(1)]))
    return found


def written_out(algorithm: str, step: dict[str, Any], logprobs: list[Tensor]) -> Tensor:
    """The loss of parity.ALGORITHMS: a weighted mean over the batch of clipped policy losses.

    Plus 0.1 k3 to the reference in the loss, or minus that in the reward.
    """
    total, returns = torch.zeros(()), whitened_returns(step)
    for i, new in enumerate(logprobs):
        mask, log_ratio = step["loss_mask"][i], new - step["old_logprobs"][i]
        if not mask.any():
            continue
        advantage = returns[i] if algorithm == "reinforce_plus_plus" else step["advantages"][i]
        ratio = torch.exp(log_ratio[mask].mean() if algorithm == "gspo" else log_ratio)
        clipped = ratio.clamp(*CLIP[algorithm])
        terms = -torch.minimum(ratio * advantage, clipped * advantage) + torch.zeros_like(new)
        if algorithm == "cispo":
            terms = -clipped.detach() * advantage * new
        if algorithm != "reinforce_plus_plus":
            terms = terms + 0.1 * k3(new, step["ref_logprobs"][i])
        total = total + terms[mask].sum() * step["token_weights"][i]
    return total / train_batch(step).denominator


class Closest(TorchFunctionMode):
    """Inside, the least distance between what torch.topk took last and what it left first."""

    gap = math.inf

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.topk, Tensor.topk):
            scores, k = args[0].detach(), (kwargs or {}).get("k") or args[1]
            first = scores.sort(dim=-1, descending=True).values[..., k - 1 : k + 1]
            if first.shape[-1] == 2:
                self.gap = min(self.gap, float(-first.diff().max()))
        return func(*args, **kwargs or {})


def k3(logprobs: Tensor, ref: Tensor) -> Tensor:
    return torch.exp(ref - logprobs) - 1 - (ref - logprobs)


def whitened_returns(step: dict[str, Any], gamma: float = 0.98) -> list[Tensor]:
    """REINFORCE++'s advantages, token by token: the reward comes with the last token of the loss."""
    found = []
    for i, mask in enumerate(step["loss_mask"]):
        penalty = 0.1 * k3(step["old_logprobs"][i], step["ref_logprobs"][i])
        value, returns, pending = (
            0.0,
            torch.zeros(len(mask), dtype=torch.float64),
            step["advantages"][i],
        )
        for t in reversed(range(len(mask))):
            value *= gamma
            if mask[t]:
                value, pending = value + pending - float(penalty[t]), 0.0
            returns[t] = value
        found.append(returns)
    every = torch.cat([x[mask] for x, mask in zip(found, step["loss_mask"], strict=True)])
    return [((x - every.mean()) / (every.var() + 1e-8).sqrt()).float() for x in found]


def reference(model_dir: Path, steps: list[dict[str, Any]], name: str = "grpo") -> Outcome:
    """Trains by the algorithm `name` on `steps`.

    It may thin out their masks a little: see _stay_clear_of_clip_edges. No token is near a tie between
    experts, which rounding could send another way.
    """
    torch.manual_seed(0)
    model = load_hf(model_dir)
    config = Layout(algorithm=name).config()
    training, algorithm = config.training, algorithms.make(config.algorithm)
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
    outcome = Outcome(
        logprobs=[p.detach() for p in sequence_logprobs(model, steps[0]["token_ids"])]
    )
    for number, step in enumerate(steps):
        lr = training.lr + (training.min_lr - training.lr) * number / config.rollout.num_rollout
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        with Closest() as closest:
            logprobs = sequence_logprobs(model, step["token_ids"])
        assert closest.gap > TIE, (
            f"step {number}: two experts' scores differ by {closest.gap:.1e} only"
        )
        _stay_clear_of_clip_edges(name, step, logprobs)
        loss = written_out(name, step, logprobs)
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_grad))
        outcome.grads.append(
            as_in_files((name, p.grad.clone()) for name, p in model.named_parameters())
        )
        optimizer.step()
        means, maxima = _metrics(step, logprobs, algorithm)
        outcome.steps.append(
            StepMetrics(
                loss=float(loss.detach()),
                grad_norm=norm,
                lr=lr,
                skipped=False,
                means=means,
                maxima=maxima,
            )
        )
    biases = (item for item in model.named_buffers() if item[0].endswith("e_score_correction_bias"))
    values = [*model.named_parameters(), *biases]
    outcome.params = as_in_files((name, value.detach().clone()) for name, value in values)
    return outcome


def as_in_files(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Experts one by one, as checkpoints have them; transformers 5 holds those of a layer in two tensors."""
    found = {}
    for name, tensor in tensors:
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            found[name] = tensor
            continue
        block, _, matrix = name.rpartition(".")
        for e, expert in enumerate(tensor):
            parts = zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True)
            for own, value in parts if matrix == "gate_up_proj" else [(matrix, expert)]:
                found[f"{block}.{e}.{own}.weight"] = value
    return found


def _stay_clear_of_clip_edges(name: str, step: dict[str, Any], logprobs: list[Tensor]) -> None:
    """A ratio at an edge may fall on either side of it, with another gradient: such tokens leave the loss."""
    edges = torch.tensor(CLIP[name])
    for new, old, mask in zip(logprobs, step["old_logprobs"], step["loss_mask"], strict=True):
        log_ratio = new.detach() - old
        while name == "gspo" and ((log_ratio[mask].mean().exp() - edges).abs() <= 1e-3).any():
            mask[mask.nonzero()[0]] = False
        if name != "gspo":
            mask &= ((log_ratio.exp()[:, None] - edges).abs() > 1e-3).all(1)


def _metrics(
    step: dict[str, Any], logprobs: list[Tensor], algorithm: Any
) -> tuple[dict[str, float], dict[str, float]]:
    """Means and maxima over the whole batch at once."""
    batch = train_batch(step)
    batch.token_advantages = algorithm.token_advantages(batch, lambda value: value)
    whole = batch.microbatch(range(len(LENGTHS)))
    _, metrics = algorithm.loss(torch.cat(logprobs).detach(), None, whole)
    means: dict[str, float] = {}
    maxima: dict[str, float] = {}
    for name, metric in metrics.items():
        match metric:
            case WeightedMean():
                means[name] = float(metric.total) / batch.denominator
            case TokenMean():
                means[name] = float(metric.total) / batch.num_tokens
            case Maximum():
                maxima[name] = float(metric.value)
    gap = (torch.cat(step["old_logprobs"]) - whole.rollout_logprobs)[whole.loss_mask].double()
    w = gap.exp()
    maxima["train/logprob_gap_max"] = float(gap.abs().max())
    means["train/logprob_gap_mean"] = float(gap.abs().mean())
    means["train/rollout_kl"] = float((w - 1 - gap).mean())
    means["train/ess_ratio"] = float(w.sum() ** 2 / (len(w) * w.square().sum()))
    return means, maxima
