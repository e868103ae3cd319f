"""Sums and means over each sequence of a pack, repeated on each of its tokens."""

import torch
from torch import Tensor


def sequence_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[T]: the sum of `values` [T] over the token's sequence; differentiable.

    Sequence s is cu_seqlens[s]:cu_seqlens[s+1].
    """
    lengths = cu_seqlens.diff().long()
    sums = torch.segment_reduce(values, "sum", lengths=lengths)
    return sums.repeat_interleave(lengths, output_size=len(values))


def sequence_mean(values: Tensor, mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[T]: the mean of `values` [T] over the tokens with `mask` [T] in the token's
    sequence.

    It is 0 for a sequence in which `mask` is False everywhere. `values` must be 0 where
    `mask` is False.
    """
    counts = sequence_sum(mask.to(values.dtype), cu_seqlens)
    return sequence_sum(values, cu_seqlens) / counts.clamp(min=1)
