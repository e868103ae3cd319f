"""Which tokens of a pack each rank of a context-parallel group has.

A sequence is cut into 2 cp_size chunks; rank r has chunks r and 2 cp_size - 1 - r, so
that the attention of all ranks costs the same. A sequence is padded at its end until
the chunks are equally long; causal attention lets no other token see the padding:

    sequences 0-6 and 0-2, cp_size 2
    padded pack   0 1 2 3 4 5 6 . | 0 1 2 .
    rank 0        0 1         6 . | 0     .
    rank 1            2 3 4 5     |   1 2
"""

from itertools import pairwise

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup


class ContextParallelShard:
    """The tokens of a pack of sequences that this rank of `group` has.

    cu_seqlens [N + 1] says where each of the N sequences begins, positions [T] number
    the tokens within them. The padded pack has P tokens, a multiple of
    `length_multiple`, which must itself be a multiple of 2 cp_size where cp_size is
    above 1. `padded_cu_seqlens` [N + 1] describes it.
    """

    def __init__(
        self, cu_seqlens: Tensor, positions: Tensor, group: ProcessGroup, length_multiple: int
    ) -> None:
        num_chunks = 2 * group.size() if group.size() > 1 else 1
        lengths = cu_seqlens.diff()
        padded_lengths = -(-lengths // num_chunks) * num_chunks
        padded_lengths[-1] += -padded_lengths.sum() % length_multiple
        ends = padded_lengths.cumsum(0, dtype=cu_seqlens.dtype)
        self.padded_cu_seqlens = torch.cat([cu_seqlens[:1], ends])
        starts = self.padded_cu_seqlens[:-1].repeat_interleave(lengths)
        self._padded_positions = starts + positions  # [T], of each token in the padded pack
        self._local_positions = positions_by_rank(self.padded_cu_seqlens, group.size())[
            group.rank()
        ]
        self._group = group

    def local(self, values: Tensor) -> Tensor:
        """[P / cp_size]: this rank's part of `values` [T]; zero where there is padding."""
        padded = values.new_zeros(int(self.padded_cu_seqlens[-1]))
        padded[self._padded_positions] = values
        return padded[self._local_positions]

    def gather(self, local: Tensor) -> Tensor:
        """[T, ...] from the [P / cp_size, ...] of each rank.

        All ranks must compute the same from it.
        """
        padded = gather(local, self.padded_cu_seqlens, self._group, sum_gradients=False)
        return padded[self._padded_positions]


def positions_by_rank(padded_cu_seqlens: Tensor, cp_size: int) -> Tensor:
    """[cp_size, P / cp_size]: the positions in a padded pack that each rank has, in its order."""
    positions = torch.arange(int(padded_cu_seqlens[-1]), device=padded_cu_seqlens.device)
    if cp_size == 1:
        return positions[None]
    chunks_by_sequence = []
    for start, end in pairwise(padded_cu_seqlens.tolist()):
        chunks_by_sequence.append(positions[start:end].view(2 * cp_size, -1))
    by_rank = []
    for rank in range(cp_size):
        own = [chunks[[rank, -1 - rank]].flatten() for chunks in chunks_by_sequence]
        by_rank.append(torch.cat(own))
    return torch.stack(by_rank)


def gather(
    local: Tensor, padded_cu_seqlens: Tensor, group: ProcessGroup, *, sum_gradients: bool
) -> Tensor:
    """[P, ...] in the order of the padded pack, from each rank's [P / cp_size, ...].

    With `sum_gradients`, the gradient of `local` is the sum over the ranks, which may
    each use the result in another way. Without, all ranks must use it in the same way,
    and the gradient is this rank's part.
    """
    if group.size() == 1:
        return local
    by_rank = gather_from_sequence_parallel_region(
        local, tensor_parallel_output_grad=sum_gradients, group=group
    )
    order = positions_by_rank(padded_cu_seqlens, group.size()).flatten().argsort()
    return by_rank[order]
