"""Logprobs and entropies of tokens from hidden states and the output weight, without logits of all tokens.

    hidden [T, H], weight [V_local, H] -> logits of a block [C, B] -> logprobs [T], entropies [T]

Logits exist for a block of tokens and vocabulary at a time, in float32 and small enough for a CPU's cache.
The backward pass computes them again: one more product with the weight.
The vocabulary may be split over tensor-parallel ranks: four numbers per token pass between them in the
forward pass, the gradient of hidden in the backward.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

CHUNK_TOKENS, CHUNK_COLUMNS = 2048, 4096
_LOWEST = torch.finfo(
    torch.float32
).min  # of a rank without a column; -inf would make NaN of 0 x inf


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
        raise ValueError(
            f"token id {int(targets.max())} is outside the vocabulary of {vocab_size} tokens"
        )
    num_columns = min(max(vocab_size - vocab_start, 0), len(weight))
    options = _Options(1.0 / temperature, vocab_start, num_columns, tp_group, chunk_tokens)
    return _LinearLogprobs.apply(hidden, weight, targets, with_entropy, options)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        with_entropy: bool,
        options: _Options,
    ) -> tuple[Tensor, Tensor | None]:
        blocks = _Blocks(hidden, weight, targets, options)
        # of the logits so far: the highest, the target's; sums of exp(x) and exp(x) x, x = logit - highest
        highest, target, total, moment = sums = blocks.new(4, len(hidden)).zero_()
        highest.fill_(_LOWEST)
        for rows, columns, logits, _ in blocks:
            before = highest[rows].clone()
            highest[rows] = torch.maximum(before, logits.amax(dim=1) * options.scale)
            _move(total[rows], moment[rows], before - highest[rows])
            at, ours = blocks.targets(rows, columns)
            target[rows] += torch.where(ours, logits.gather(1, at).squeeze(1), 0.0) * options.scale
            shifted = torch.add(-highest[rows, None], logits, alpha=options.scale, out=logits)
            probs = blocks.exp(shifted) if with_entropy else shifted.exp_()
            total[rows] += probs.sum(dim=1)
            if with_entropy:
                moment[rows] += probs.mul_(shifted).sum(dim=1)
        if options.group is not None:
            local = highest.clone()
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=options.group)
            _move(total, moment, local - highest)
            dist.all_reduce(sums[1:], group=options.group)
        log_total = total.log()
        entropy = log_total - moment / total if with_entropy else None
        ctx.save_for_backward(hidden, weight, targets, highest + log_total, entropy)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return target - highest - log_total, entropy

    @staticmethod
    def backward(
        ctx: Any, d_logprobs: Tensor | None, d_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_norm, entropy = ctx.saved_tensors
        options: _Options = ctx.options
        blocks = _Blocks(hidden, weight, targets, options)
        d_hidden = torch.zeros_like(hidden, dtype=blocks.dtype)
        d_weight, d_columns = torch.zeros_like(weight), torch.empty(0)
        d_target = torch.zeros_like(log_norm) if d_logprobs is None else d_logprobs * options.scale
        for rows, columns, logits, block in blocks:
            logs = torch.add(-log_norm[rows, None], logits, alpha=options.scale, out=logits)
            if d_entropy is None:
                d_logits = logs.exp_().mul_(-d_target[rows, None])
            else:  # d entropy / d logits = -p (log p + entropy), at temperature 1
                of_entropy = d_entropy[rows] * options.scale
                probs, even = blocks.exp(logs), d_target[rows] + of_entropy * entropy[rows]
                d_logits = logs.mul_(-of_entropy[:, None]).sub_(even[:, None]).mul_(probs)
            at, ours = blocks.targets(rows, columns)
            d_logits.scatter_add_(1, at, torch.where(ours, d_target[rows], 0.0)[:, None])
            d_logits = d_logits.to(block.dtype)
            _add_product(d_hidden[rows], d_logits, block)
            if rows.start == 0:
                d_columns = d_weight[columns].to(
                    blocks.dtype
                )  # zeros: a view where the types are one
            _add_product(d_columns, d_logits.T, blocks.hidden[rows])
            if rows.stop == len(hidden):
                d_weight[columns] = d_columns
        if options.group is not None:
            dist.all_reduce(d_hidden, group=options.group)
        return d_hidden.to(hidden.dtype), d_weight, None, None, None


class _Blocks:
    """Iterates over (rows, columns, their logits [C, B], those rows of the weight [B, H]), columns slowest.

    The next logits lie where the last ones did.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor, options: _Options) -> None:
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        # only there torch multiplies bfloat16 into float32
        self._type = hidden.dtype if hidden.is_cuda else self.dtype
        self.hidden, self._weight = hidden.to(self._type), weight[: options.num_columns]
        self._targets, self._options = targets - options.vocab_start, options
        self._spare = self.new(0)

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.hidden.device)

    def exp(self, logits: Tensor) -> Tensor:
        """In memory of its own, the same for each block."""
        if not len(self._spare):
            self._spare = torch.empty_like(logits).view(-1)  # the first block is the largest
        return torch.exp(logits, out=self._spare[: logits.numel()].view_as(logits))

    def targets(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """[C, 1]: the places of the rows' targets in the block; [C]: whether they are in it at all."""
        at, width = self._targets[rows] - columns.start, columns.stop - columns.start
        return at.clamp(0, width - 1)[:, None], (at >= 0) & (at < width)

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        chunk_tokens = self._options.chunk_tokens
        buffer = self.new(
            min(chunk_tokens, len(self.hidden)) * min(CHUNK_COLUMNS, len(self._weight))
        )
        for columns in _slices(len(self._weight), CHUNK_COLUMNS):
            block = self._weight[columns].to(self._type)
            for rows in _slices(len(self.hidden), chunk_tokens):
                size = (rows.stop - rows.start, len(block))
                logits = buffer[: size[0] * size[1]].view(size)
                _add_product(logits, self.hidden[rows], block.T, beta=0.0)
                yield rows, columns, logits, block


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _move(total: Tensor, moment: Tensor, down: Tensor) -> None:
    """Sums of exp(x) and of exp(x) x become those of x + down, in place."""
    moment.add_(down * total).mul_(down.exp())
    total.mul_(down.exp())


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, beta: float = 1.0) -> Tensor:
    """total = beta total + a b, summed in float32 also where a and b are of half precision."""
    options = {"out_dtype": torch.float32} if a.dtype in (torch.bfloat16, torch.float16) else {}
    return torch.addmm(total, a, b, beta=beta, out=total, **options)
