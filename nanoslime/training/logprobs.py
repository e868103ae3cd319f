"""Logprobs and entropies of tokens from hidden states and the output weight, without logits of all tokens.

    hidden [T, H], weight [V_local, H] -> logits of a chunk [C, V_local] -> logprobs [T], entropies [T]

Logits exist for one chunk of tokens at a time, in float32; the backward pass computes them again, so that the
price of the memory is one more product with the weight. The vocabulary may be split over tensor-parallel
ranks: three numbers per token pass between them in the forward pass, the gradient of hidden in the backward.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

CHUNK_TOKENS = 1024
_LOWEST = torch.finfo(torch.float32).min  # of a rank without a column; -inf would make NaN of 0 x inf


class _Options(NamedTuple):
    """What the rows of the weight are, and how they are worked through."""

    scale: float  # of the logits: 1 / temperature
    vocab_start: int
    num_columns: int  # rows of the weight that are tokens, from the first; the others are padding
    group: ProcessGroup | None
    chunk_tokens: int


def token_logprobs(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, cu_seqlens: Tensor, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Of packed sequences, logprobs [T]: result[t] = log p(token_ids[t] | tokens before it in its sequence).

    It comes from hidden[t - 1], as does the entropy [T] of the distribution that token t was drawn from; the
    first token of a sequence gets exactly 0.0 of both. `token_ids` [T], `cu_seqlens` [S+1]; the options, and
    what is raised, are those of linear_logprobs.
    """
    first = torch.zeros_like(token_ids, dtype=torch.bool)
    first[cu_seqlens[:-1].long()] = True
    # row t speaks of token t + 1; the last row speaks of nothing and gets any target
    logprobs, entropy = linear_logprobs(hidden, weight, token_ids.roll(-1), **options)
    logprobs = logprobs.roll(1).masked_fill(first, 0.0)
    return logprobs, None if entropy is None else entropy.roll(1).masked_fill(first, 0.0)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    vocab_size: int,
    vocab_start: int = 0,
    tp_group: ProcessGroup | None = None,
    with_entropy: bool = False,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden weight^T / temperature)[targets] and, where asked, the entropy; both [T] float32.

    `hidden` [T, H], `targets` [T]. `weight` [V_local, H] are the rows from `vocab_start` on of the output
    weight; rows of index >= `vocab_size` are padding and take no part in the softmax. Products are summed in
    float32 (float64 for float64 input, results too). Differentiable in both, the gradient of the weight being
    summed over tokens in float32; an entropy that nothing depends on costs the backward pass nothing. With
    `tp_group` every rank of it has the same hidden and targets, gets the same results, must pass on the same
    gradients, and gets the whole gradient of hidden. Raises ValueError for a temperature that is not positive
    and for a token outside the vocabulary.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
    if int(targets.max()) >= vocab_size:
        raise ValueError(f"token id {int(targets.max())} is outside the vocabulary of {vocab_size} tokens")
    num_columns = min(max(vocab_size - vocab_start, 0), len(weight))
    options = _Options(1.0 / temperature, vocab_start, num_columns, tp_group, chunk_tokens)
    logprobs, entropy = _LinearLogprobs.apply(hidden, weight, targets, with_entropy, options)
    return logprobs, entropy


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, with_entropy: bool, options: _Options
    ) -> tuple[Tensor, Tensor | None]:
        chunks = _Chunks(hidden, weight, targets, options)
        # of the logits less the highest: that highest; the sum of exp, of exp times them, the target's
        highest = chunks.new(len(hidden)).fill_(_LOWEST)
        total, moment, target = sums = chunks.new(3, len(hidden)).zero_()
        for rows, logits in chunks:
            highest[rows] = logits.amax(dim=1) * options.scale
            shifted = _scale_and_add(logits, options.scale, -highest[rows])
            picked = shifted.gather(1, chunks.columns[rows]).squeeze(1)
            target[rows] = torch.where(chunks.ours[rows], picked, 0.0)
            probs = chunks.exp(shifted) if with_entropy else shifted.exp_()
            total[rows] = probs.sum(dim=1)
            if with_entropy:
                moment[rows] = probs.mul_(shifted).sum(dim=1)
        if options.group is not None:
            _sum_over_ranks(highest, sums, chunks.ours, options.group)
        log_total = total.log()
        entropy = log_total - moment / total if with_entropy else None
        ctx.save_for_backward(hidden, weight, targets, highest + log_total, entropy)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return target - log_total, entropy

    @staticmethod
    def backward(ctx: Any, d_logprobs: Tensor | None, d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_norm, entropy = ctx.saved_tensors
        options: _Options = ctx.options
        chunks = _Chunks(hidden, weight, targets, options)
        d_hidden = torch.zeros_like(hidden, dtype=chunks.dtype)
        d_weight = torch.zeros_like(weight, dtype=chunks.dtype)
        d_target = torch.zeros_like(log_norm) if d_logprobs is None else d_logprobs * options.scale
        for rows, logits in chunks:
            logs = _scale_and_add(logits, options.scale, -log_norm[rows])
            if d_entropy is None:
                d_logits = logs.exp_().mul_(-d_target[rows, None])
            else:  # d entropy / d logits = -p (log p + entropy), at temperature 1
                of_entropy = d_entropy[rows] * options.scale
                probs, even = chunks.exp(logs), d_target[rows] + of_entropy * entropy[rows]
                d_logits = logs.mul_(-of_entropy[:, None]).sub_(even[:, None]).mul_(probs)
            at_target = torch.where(chunks.ours[rows], d_target[rows], 0.0)
            d_logits = d_logits.scatter_add_(1, chunks.columns[rows], at_target[:, None])
            d_logits = d_logits.to(chunks.weight.dtype)
            d_hidden[rows] = _product(d_logits, chunks.weight)
            _add_product(d_weight[: options.num_columns], d_logits.T, chunks.hidden[rows])
        if options.group is not None:
            dist.all_reduce(d_hidden, group=options.group)
        return d_hidden.to(hidden.dtype), d_weight.to(weight.dtype), None, None, None


class _Chunks:
    """Iterates over (rows, their logits [C, num_columns]); the next logits lie where the last ones did."""

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor, options: _Options) -> None:
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        if not hidden.is_cuda:  # elsewhere torch does not multiply bfloat16 into float32
            hidden, weight = hidden.to(self.dtype), weight.to(self.dtype)
        self.hidden, self.weight = hidden, weight[: options.num_columns]
        targets = targets - options.vocab_start
        self.ours = (targets >= 0) & (targets < options.num_columns)  # [T]: the target is a column here
        self.columns = targets.clamp(0, max(options.num_columns - 1, 0))[:, None]  # [T, 1]
        self._chunk_tokens = min(options.chunk_tokens, len(hidden))
        self._spare: Tensor | None = None

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.hidden.device)

    def exp(self, logits: Tensor) -> Tensor:
        """In memory of its own, the same for each chunk."""
        if self._spare is None:
            self._spare = torch.empty_like(logits)  # the first chunk is the largest
        return torch.exp(logits, out=self._spare[: len(logits)])

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        if not len(self.weight):  # nothing but padding
            return
        buffer = self.new(self._chunk_tokens, len(self.weight))
        for start in range(0, len(self.hidden), self._chunk_tokens):
            rows = slice(start, min(start + self._chunk_tokens, len(self.hidden)))
            yield rows, _product(self.hidden[rows], self.weight.T, buffer[: rows.stop - start])


def _sum_over_ranks(highest: Tensor, sums: Tensor, ours: Tensor, group: ProcessGroup) -> None:
    """Makes `highest` and the sums less it those of the whole vocabulary, in place."""
    local = highest.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    down, (total, moment, target) = local - highest, sums
    moment.add_(down * total).mul_(down.exp())
    total.mul_(down.exp())
    target.add_(torch.where(ours, down, 0.0))
    dist.all_reduce(sums, group=group)


def _scale_and_add(matrix: Tensor, scale: float, column: Tensor) -> Tensor:
    """matrix [C, V] * scale + column [C], in place."""
    return torch.add(column[:, None], matrix, alpha=scale, out=matrix)


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b, summed and returned in float32 also where these are of half precision."""
    if a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a, b, out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in float32 as in _product."""
    if a.dtype in (torch.bfloat16, torch.float16):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a, b)
