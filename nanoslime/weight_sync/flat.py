"""How a bucket lies in one flat tensor of bytes, after its header (sealed_bucket.py)."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from nanoslime.sealed_bucket import HEADER, HEADER_BYTES, HEADER_WORDS
from nanoslime.weight_sync.plan import Bucket, lengths


class FlatBucket:
    """How a bucket lies in a flat tensor; names, dtypes and shapes are those that engines get."""

    def __init__(self, bucket: Bucket) -> None:
        self.names = [HEADER, *(tensor.label for tensor in bucket.tensors)]
        self.dtypes = [torch.int64, *(tensor.dtype for tensor in bucket.tensors)]
        self.shapes = [(HEADER_WORDS,), *(lengths(tensor.box) for tensor in bucket.tensors)]
        self.nbytes = HEADER_BYTES + bucket.nbytes
        # What is sealed of them.
        self.parts = list(zip(self.names[1:], self.dtypes[1:], self.shapes[1:], strict=True))

    def views(self, flat: Tensor) -> list[Tensor]:
        """The tensors of the bucket within its bytes, uint8 [nbytes]."""
        return views_of(flat[HEADER_BYTES:], [(dtype, shape) for _, dtype, shape in self.parts])


def views_of(data: Tensor, kinds: Iterable[tuple[torch.dtype, Sequence[int]]]) -> list[Tensor]:
    """Tensors of these dtypes and shapes, which lie one after the other in uint8 [n].

    Each is aligned where those of larger elements come first.
    """
    views = []
    start = 0
    for dtype, shape in kinds:
        stop = start + dtype.itemsize * math.prod(shape)
        views.append(data[start:stop].view(dtype).reshape(shape))
        start = stop
    return views
