"""Logprobs of tokens in packed sequences; the vocabulary may be split over tensor-parallel ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

_ROWS_AT_A_TIME = 1024  # float32 copies of logits exist for so many rows only


def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    cu_seqlens: Tensor,
    *,
    temperature: float,
    vocab_size: int,
    vocab_start: int = 0,
    tp_group: ProcessGroup | None = None,
) -> Tensor:
    """[T] float32: result[t] = log p(token_ids[t] | tokens before it in its sequence) at `temperature`.

    It comes from logits[t - 1]; the first token of a sequence gets exactly 0.0. `logits` [T, V_local] are the
    columns from `vocab_start` on of the vocabulary; columns of index >= `vocab_size` are padding and take no
    part in the softmax. `token_ids` [T], `cu_seqlens` [S+1]. Differentiable in `logits`, which it leaves as
    they are; with `tp_group` every rank of it gets the same result and must pass on the same gradient. Raises
    ValueError for a temperature that is not positive and for a token outside the vocabulary.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
    if int(token_ids.max()) >= vocab_size:
        raise ValueError(f"token id {int(token_ids.max())} is outside the vocabulary of {vocab_size} tokens")
    num_real = min(max(vocab_size - vocab_start, 0), logits.shape[1])
    # row t of the logits speaks of token t + 1; the last row speaks of nothing and gets any target
    targets = token_ids.roll(-1) - vocab_start
    rows = _TargetLogprobs.apply(logits, targets, num_real, 1.0 / temperature, tp_group)
    first = torch.zeros_like(token_ids, dtype=torch.bool)
    first[cu_seqlens[:-1].long()] = True
    return rows.roll(1).masked_fill(first, 0.0)


class _TargetLogprobs(torch.autograd.Function):
    """[T] log softmax(logits * scale)[targets] over all ranks; targets count from this rank's first."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, num_real: int, scale: float, group: ProcessGroup | None
    ) -> Tensor:
        highest = logits.new_full((len(logits),), -torch.inf, dtype=torch.float32)
        if num_real:
            highest = logits[:, :num_real].amax(dim=1).float() * scale
        if group is not None:
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        ours = (targets >= 0) & (targets < num_real)
        sums = torch.zeros(2, len(logits), device=logits.device)  # of exp; of the target's logit
        for start in range(0, len(logits), _ROWS_AT_A_TIME):
            rows = slice(start, start + _ROWS_AT_A_TIME)
            shifted = logits[rows, :num_real].float() * scale - highest[rows, None]
            sums[0, rows] = shifted.exp().sum(dim=1)
            if num_real:
                picked = shifted.gather(1, targets[rows, None].clamp(0, num_real - 1)).squeeze(1)
                sums[1, rows] = torch.where(ours[rows], picked, 0.0)
        if group is not None:
            dist.all_reduce(sums, group=group)
        log_total = sums[0].log()
        ctx.save_for_backward(logits, targets, ours, highest + log_total)
        ctx.num_real, ctx.scale = num_real, scale
        return sums[1] - log_total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, ours, log_norm = ctx.saved_tensors
        num_real, scale = ctx.num_real, ctx.scale
        result = torch.zeros_like(logits)
        for start in range(0, len(logits), _ROWS_AT_A_TIME):
            rows = slice(start, start + _ROWS_AT_A_TIME)
            probs = (logits[rows, :num_real].float() * scale - log_norm[rows, None]).exp()
            d_logits = probs * (-grad[rows] * scale)[:, None]
            if num_real:
                d_target = torch.where(ours[rows], grad[rows] * scale, 0.0)
                d_logits.scatter_add_(1, targets[rows, None].clamp(0, num_real - 1), d_target[:, None])
            result[rows, :num_real] = d_logits
        return result, None, None, None, None
