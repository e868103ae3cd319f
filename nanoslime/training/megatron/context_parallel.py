"""Which tokens of a pack each rank of a context-parallel group has.

A sequence is cut into 2 cp_size chunks; rank r has chunks r and 2 cp_size - 1 - r, so
that the attention of all ranks costs the same. A sequence is padded at its end until
the chunks are equally long; causal attention lets no other token see the padding:

    sequences 0-6 and 0-2, cp_size 2
    padded pack   0 1 2 3 4 5 6 . | 0 1 2 .
    rank 0        0 1         6 . | 0     .
    rank 1            2 3 4 5     |   1 2

The host knows the lengths, so it computes all indices. Nothing here waits for the
device.
"""

from collections.abc import Sequence

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from nanoslime.batch import on_device


class ContextParallelShard:
    """The tokens of a pack of sequences that this rank of `group` has.

    lengths [N] are the tokens of each sequence, T together. The padded pack has P
    tokens, a multiple of `length_multiple`, which must itself be a multiple of 2 cp_size
    where cp_size is above 1; `padded_lengths` [N] describes it. Values lie on `device`.
    """

    def __init__(
        self, lengths: list[int], group: ProcessGroup, length_multiple: int, device: torch.device
    ) -> None:
        cp_size = group.size()
        self._group = group
        num_chunks = _num_chunks(cp_size)
        self.padded_lengths = [-(-length // num_chunks) * num_chunks for length in lengths]
        self.padded_lengths[-1] += -sum(self.padded_lengths) % length_multiple
        positions = torch.cat([torch.arange(length) for length in self.padded_lengths])
        by_rank = positions_by_rank(self.padded_lengths, cp_size)
        own = by_rank[group.rank()]

        own_lengths = torch.tensor(lengths).repeat_interleave(torch.tensor(self.padded_lengths))
        is_token = positions < own_lengths
        token_at = torch.full([len(positions)], -1)
        token_at[is_token] = torch.arange(sum(lengths))
        # [P / cp_size] on the host: the number in the pack of each token here; -1 is padding.
        self.tokens = token_at[own]
        self._tokens = on_device(self.tokens, device)
        # [P / cp_size]: the place of each token here within its sequence.
        self.positions = on_device(positions[own], device)
        order = by_rank.flatten().argsort()
        # Where the padded pack, and the tokens [T] among it, are in the parts of all ranks.
        self._order = on_device(order, device)
        self._token_order = on_device(order[is_token], device)
        ends = torch.tensor([0, *self.padded_lengths]).cumsum(0)
        # [N + 1]: where each sequence begins in the padded pack.
        self.padded_cu_seqlens = on_device(ends.to(torch.int32), device)

    @property
    def local_lengths(self) -> list[int]:
        """[N]: how much of each padded sequence is here."""
        return [length // self._group.size() for length in self.padded_lengths]

    def local(self, values: Tensor) -> Tensor:
        """[P / cp_size]: this rank's part of `values` [T]; zero where there is padding."""
        zero = values.new_zeros(1)
        return torch.cat([values, zero])[self._tokens]

    def gather(self, local: Tensor) -> Tensor:
        """[T, ...] from the [P / cp_size, ...] of each rank.

        All ranks must compute the same from it, and the gradient of `local` is this
        rank's part.
        """
        return self._all(local, sum_gradients=False).index_select(0, self._token_order)

    def gather_padded(self, local: Tensor) -> Tensor:
        """[P, ...] in the order of the padded pack, from the [P / cp_size, ...] of each rank.

        The ranks may each use it in another way: the gradient of `local` is the sum
        over them.
        """
        if self._group.size() == 1:
            return local
        return self._all(local, sum_gradients=True).index_select(0, self._order)

    def _all(self, local: Tensor, *, sum_gradients: bool) -> Tensor:
        if self._group.size() == 1:
            return local
        return gather_from_sequence_parallel_region(
            local, tensor_parallel_output_grad=sum_gradients, group=self._group
        )


def positions_by_rank(padded_lengths: Sequence[int], cp_size: int) -> Tensor:
    """[cp_size, P / cp_size]: the positions in a padded pack that each rank has, in its order."""
    num_chunks = _num_chunks(cp_size)
    chunks = torch.cat([torch.arange(n) * num_chunks // n for n in padded_lengths])
    owners = torch.minimum(chunks, num_chunks - 1 - chunks)
    return owners.argsort(stable=True).view(cp_size, -1)


def _num_chunks(cp_size: int) -> int:
    return 2 * cp_size if cp_size > 1 else 1
