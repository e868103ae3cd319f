"""Which tokens of a pack lie on which rank of a context-parallel group, and how they come together.

A sequence is cut into 2 cp chunks; rank r has chunks r and 2 cp - 1 - r, so that all ranks attend to equally
much. It is padded at its end for that, where causal attention lets no other token see:

    sequences 0-6 and 0-2, cp 2    0 1 2 3 4 5 6 . | 0 1 2 .     rank 0: 0 1 6 . 0 .   rank 1: 2 3 4 5 1 2
"""

from itertools import pairwise

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup


class Spread:
    """A pack of sequences over the ranks of `group`: `cu_seqlens` [N + 1], `positions` [T] within them.

    `multiple` divides the P places of the padded pack, which `bounds` [N + 1] describes; it must itself be a
    multiple of 2 cp_size where cp_size is above 1.
    """

    def __init__(
        self, cu_seqlens: Tensor, positions: Tensor, group: ProcessGroup, multiple: int
    ) -> None:
        chunks = 2 * group.size() if group.size() > 1 else 1
        lengths = -(-cu_seqlens.diff() // chunks) * chunks
        lengths[-1] += -lengths.sum() % multiple
        self.bounds = torch.cat([cu_seqlens[:1], lengths.cumsum(0, dtype=cu_seqlens.dtype)])
        self._places = positions + self.bounds[:-1].repeat_interleave(cu_seqlens.diff())
        self._held = held_by_ranks(self.bounds, group.size())[group.rank()]
        self._group = group

    def here(self, values: Tensor) -> Tensor:
        """[P / cp_size], this rank's share of `values` [T]; zero where there is padding."""
        padded = values.new_zeros(int(self.bounds[-1]))
        padded[self._places] = values
        return padded[self._held]

    def whole(self, here: Tensor) -> Tensor:
        """[T, ...] from what each rank has, [P / cp_size, ...]; all must go on with it in the same way."""
        return gather(here, self.bounds, self._group, sum_gradients=False)[self._places]


def held_by_ranks(bounds: Tensor, cp_size: int) -> Tensor:
    """[cp_size, P / cp_size]: the places in a pack, padded as above, that each rank has, in its order."""
    places = torch.arange(int(bounds[-1]), device=bounds.device)
    if cp_size == 1:
        return places[None]
    chunks = [places[a:b].view(2 * cp_size, -1) for a, b in pairwise(bounds.tolist())]
    return torch.stack(
        [torch.cat([c[[r, -1 - r]].flatten() for c in chunks]) for r in range(cp_size)]
    )


def gather(here: Tensor, bounds: Tensor, group: ProcessGroup, *, sum_gradients: bool) -> Tensor:
    """[P, ...] in the order of the pack, from what the ranks of `group` have, [P / cp_size, ...] each.

    The gradient of `here` is the sum over ranks of what they do with the whole; without `sum_gradients`,
    where all do the same, it is this rank's share of it.
    """
    if group.size() == 1:
        return here
    held = gather_from_sequence_parallel_region(
        here, tensor_parallel_output_grad=sum_gradients, group=group
    )
    return held[held_by_ranks(bounds, group.size()).flatten().argsort()]
