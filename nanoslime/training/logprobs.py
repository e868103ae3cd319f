"""Logprobs and entropies of tokens from hidden states and the output weight.

    hidden [T, H], weight [V_local, H] -> logits of a block [C, B] -> logprobs [T], entropies [T]

Logits exist for a block of tokens and vocabulary at a time, in float32 and small enough
for a CPU's cache. The backward pass computes them again, with one more product with the
weight. The vocabulary may be split over tensor-parallel ranks: four numbers per token
pass between them in the forward pass, and the gradient of hidden in the backward pass.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

CHUNK_TOKENS = 2048
CHUNK_COLUMNS = 4096
# A GPU's kernels on a small block end before the host has started the next ones.
CUDA_CHUNK_COLUMNS = 16_384
# The highest logit of a rank without a column; -inf would make NaN of 0 x inf.
_LOWEST = torch.finfo(torch.float32).min


class _Options(NamedTuple):
    """What the rows of the weight are, and how they are worked through."""

    scale: float  # of the logits: 1 / temperature
    vocab_start: int  # the token of the weight's first row
    num_columns: int  # the first rows of the weight, which are tokens; the others are padding
    group: ProcessGroup | None
    chunk_tokens: int
    with_entropy: bool


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    cu_seqlens: Tensor,
    *,
    temperature: float,
    vocab_size: int,
    with_entropy: bool = False,
    only: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Logprobs and, where asked, entropies of packed sequences; both [T] float32.

    logprobs[t] is log p(token_ids[t] | tokens before it in its sequence), from hidden[t -
    1]. entropies[t] belongs to the distribution that token t was drawn from. Both are
    exactly 0.0 at the first token of a sequence and, where `only` (int64 [N], without
    first tokens) names tokens, at all others. `token_ids` [T], `cu_seqlens` [S+1]; the
    other arguments, and the errors, are those of `linear_logprobs`.
    """
    # Row t predicts token t + 1. The last row predicts nothing and gets any target.
    targets = token_ids.roll(-1)
    if only is not None:
        hidden = hidden.index_select(0, only - 1)
        targets = token_ids[only]
    logprobs, entropy = linear_logprobs(
        hidden,
        weight,
        targets,
        temperature=temperature,
        vocab_size=vocab_size,
        with_entropy=with_entropy,
    )
    first = torch.zeros_like(token_ids, dtype=torch.bool)
    first[cu_seqlens[:-1].long()] = True

    def on_tokens(values: Tensor) -> Tensor:
        if only is None:
            return values.roll(1).masked_fill(first, 0.0)
        return values.new_zeros(len(token_ids)).index_copy(0, only, values)

    return on_tokens(logprobs), None if entropy is None else on_tokens(entropy)


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
    """log softmax(hidden weight^T / temperature)[targets] and, where asked, the entropy.

    Both are [T] float32 (float64 for float64 input). `hidden` [T, H], `targets` [T];
    `weight` [V_local, H] holds the rows of the output weight from `vocab_start` on. Rows
    with an index >= `vocab_size` are padding and take no part in the softmax. Products
    are summed in float32.

    Both are differentiable in hidden and weight. The gradient of the weight is summed
    over tokens in float32. An entropy that nothing depends on costs the backward pass
    nothing.

    Every rank of `tp_group` has the same hidden and targets, gets the same results, must
    pass on the same gradients, and gets the whole gradient of hidden.

    Raises ValueError for a temperature that is not positive, and for a token outside the
    vocabulary; on a GPU, which nothing here waits for, such a token ends the process with
    a failed assertion.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
    _check_targets(targets, vocab_size)
    num_columns = min(max(vocab_size - vocab_start, 0), len(weight))
    options = _Options(
        scale=1.0 / temperature,
        vocab_start=vocab_start,
        num_columns=num_columns,
        group=tp_group,
        chunk_tokens=chunk_tokens,
        with_entropy=with_entropy,
    )
    return _LinearLogprobs.apply(hidden, weight, targets, options)


def _check_targets(targets: Tensor, vocab_size: int) -> None:
    outside = (targets < 0) | (targets >= vocab_size)
    if targets.is_cuda:
        message = f"a token id is outside the vocabulary of {vocab_size} tokens"
        torch._assert_async(~outside.any(), message)
    elif outside.any():
        raise ValueError(
            f"token id {int(targets[outside][0])} is outside the vocabulary of {vocab_size} tokens"
        )


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor | None]:
        blocks = _Blocks(hidden, weight, targets, options)
        # For each token, over its logits so far: the highest logit, the target's logit,
        # and, for x = logit - highest, the sums of exp(x) and of exp(x) x.
        statistics = blocks.new(4, len(hidden)).zero_()
        max_logit, target_logit, exp_sum, weighted_logit_sum = statistics
        max_logit.fill_(_LOWEST)
        for rows, columns, logits, _ in blocks:
            previous_max = max_logit[rows].clone()
            block_max = logits.amax(dim=1) * options.scale
            max_logit[rows] = torch.maximum(previous_max, block_max)
            shift = previous_max - max_logit[rows]
            _shift_sums(exp_sum[rows], weighted_logit_sum[rows], shift)

            at, in_block = blocks.targets(rows, columns)
            found = torch.where(in_block, logits.gather(1, at).squeeze(1), 0.0)
            target_logit[rows] += found * options.scale

            shifted = torch.add(-max_logit[rows, None], logits, alpha=options.scale, out=logits)
            if options.with_entropy:
                exp = blocks.exp(shifted)
                exp_sum[rows] += exp.sum(dim=1)
                weighted_logit_sum[rows] += exp.mul_(shifted).sum(dim=1)
            else:
                exp_sum[rows] += shifted.exp_().sum(dim=1)
        if options.group is not None:
            local_max = max_logit.clone()
            dist.all_reduce(max_logit, op=dist.ReduceOp.MAX, group=options.group)
            _shift_sums(exp_sum, weighted_logit_sum, local_max - max_logit)
            dist.all_reduce(statistics[1:], group=options.group)
        log_exp_sum = exp_sum.log()
        entropy = log_exp_sum - weighted_logit_sum / exp_sum if options.with_entropy else None
        log_normalizer = max_logit + log_exp_sum
        ctx.save_for_backward(hidden, weight, targets, log_normalizer, entropy)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return target_logit - max_logit - log_exp_sum, entropy

    @staticmethod
    def backward(
        ctx: Any, d_logprobs: Tensor | None, d_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_normalizer, entropy = ctx.saved_tensors
        options: _Options = ctx.options
        blocks = _Blocks(hidden, weight, targets, options)
        d_hidden = torch.zeros_like(hidden, dtype=blocks.dtype)
        d_weight = torch.zeros_like(weight)
        d_columns = torch.empty(0)
        if d_logprobs is None:
            d_target = torch.zeros_like(log_normalizer)
        else:
            d_target = d_logprobs * options.scale
        for rows, columns, logits, block_weight in blocks:
            log_probs = torch.add(
                -log_normalizer[rows, None], logits, alpha=options.scale, out=logits
            )
            if d_entropy is None:
                d_logits = log_probs.exp_().mul_(-d_target[rows, None])
            else:
                # At temperature 1, d entropy / d logits = -p (log p + entropy).
                scaled_d_entropy = d_entropy[rows] * options.scale
                per_token = d_target[rows] + scaled_d_entropy * entropy[rows]
                probs = blocks.exp(log_probs)
                d_logits = log_probs.mul_(-scaled_d_entropy[:, None])
                d_logits = d_logits.sub_(per_token[:, None]).mul_(probs)
            at, in_block = blocks.targets(rows, columns)
            d_block_target = torch.where(in_block, d_target[rows], 0.0)
            d_logits.scatter_add_(1, at, d_block_target[:, None])
            d_logits = d_logits.to(block_weight.dtype)
            _add_product(d_hidden[rows], d_logits, block_weight)
            # Rows vary fastest: the gradient of a block of columns is whole at the last
            # rows.
            if rows.start == 0:
                # Zeros: a view of d_weight where both have one type.
                d_columns = d_weight[columns].to(blocks.dtype)
            _add_product(d_columns, d_logits.T, blocks.hidden[rows])
            if rows.stop == len(hidden):
                d_weight[columns] = d_columns
        if options.group is not None:
            dist.all_reduce(d_hidden, group=options.group)
        return d_hidden.to(hidden.dtype), d_weight, None, None


class _Block(NamedTuple):
    rows: slice  # C tokens
    columns: slice  # B rows of the weight
    logits: Tensor  # [C, B], not yet divided by the temperature
    weight: Tensor  # [B, H]


class _Blocks:
    """Iterates over blocks of logits, rows fastest. Each block's logits overwrite the
    last one's.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor, options: _Options) -> None:
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        # Only on CUDA torch multiplies bfloat16 into float32.
        self._factor_dtype = hidden.dtype if hidden.is_cuda else self.dtype
        self.hidden = hidden.to(self._factor_dtype)
        self._weight = weight[: options.num_columns]
        self._targets = targets - options.vocab_start
        self._chunk_tokens = options.chunk_tokens
        self._chunk_columns = CUDA_CHUNK_COLUMNS if hidden.is_cuda else CHUNK_COLUMNS
        self._exp_buffer = self.new(0)

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.hidden.device)

    def exp(self, logits: Tensor) -> Tensor:
        """exp of `logits` [C, B], in memory that the next call uses again."""
        if not len(self._exp_buffer):
            self._exp_buffer = self.new(logits.numel())  # the first block is the largest
        out = self._exp_buffer[: logits.numel()].view_as(logits)
        return torch.exp(logits, out=out)

    def targets(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """[C, 1]: columns of the rows' targets in the block; [C]: whether they are in it."""
        width = columns.stop - columns.start
        at = self._targets[rows] - columns.start
        in_block = (at >= 0) & (at < width)
        return at.clamp(0, width - 1)[:, None], in_block

    def __iter__(self) -> Iterator[_Block]:
        num_tokens = len(self.hidden)
        num_columns = len(self._weight)
        buffer_rows = min(self._chunk_tokens, num_tokens)
        buffer_columns = min(self._chunk_columns, num_columns)
        buffer = self.new(buffer_rows * buffer_columns)
        for columns in _slices(num_columns, self._chunk_columns):
            weight = self._weight[columns].to(self._factor_dtype)
            for rows in _slices(num_tokens, self._chunk_tokens):
                shape = (rows.stop - rows.start, len(weight))
                logits = buffer[: shape[0] * shape[1]].view(shape)
                _add_product(logits, self.hidden[rows], weight.T, beta=0.0)
                yield _Block(rows, columns, logits, weight)


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _shift_sums(exp_sum: Tensor, weighted_logit_sum: Tensor, shift: Tensor) -> None:
    """Turns the sums of exp(x) and exp(x) x into those of x + shift, in place; all [C]."""
    factor = shift.exp()
    weighted_logit_sum.add_(shift * exp_sum).mul_(factor)
    exp_sum.mul_(factor)


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, beta: float = 1.0) -> Tensor:
    """total = beta total + a b, summed in float32 also for a and b of half precision."""
    if a.dtype in (torch.bfloat16, torch.float16):
        return torch.addmm(total, a, b, beta=beta, out=total, out_dtype=torch.float32)
    return torch.addmm(total, a, b, beta=beta, out=total)
