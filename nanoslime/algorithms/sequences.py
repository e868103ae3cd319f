"""Sums and means over each sequence of a pack, on every one of its tokens."""

import torch
from torch import Tensor


def sequence_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[T]: the sum of `values` [T] over its sequence cu_seqlens[s]:cu_seqlens[s+1];
    differentiable.
    """
    lengths = cu_seqlens.diff().long()
    sums = torch.segment_reduce(values, "sum", lengths=lengths)
    return sums.repeat_interleave(lengths, output_size=len(values))


def sequence_mean(values: Tensor, mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[T]: the mean over the sequence's tokens with `mask`, 0 without any; `values` are 0
    elsewhere.
    """
    return sequence_sum(values, cu_seqlens) / sequence_sum(mask.to(values.dtype), cu_seqlens).clamp(
        min=1
    )
