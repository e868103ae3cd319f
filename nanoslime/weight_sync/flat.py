"""How a bucket lies in one flat tensor of bytes, after its header (sealed_bucket.py)."""

import torch
from torch import Tensor

from nanoslime.sealed_bucket import HEADER, HEADER_BYTES, HEADER_WORDS
from nanoslime.weight_sync.plan import Bucket, lengths


class FlatBucket:
    """How a bucket lies in a flat tensor; names, dtypes and shapes are those that engines get."""

    def __init__(self, bucket: Bucket) -> None:
        self._tensors = bucket.tensors
        self.names = [HEADER, *(tensor.label for tensor in bucket.tensors)]
        self.dtypes = [torch.int64, *(tensor.dtype for tensor in bucket.tensors)]
        self.shapes = [(HEADER_WORDS,), *(lengths(tensor.box) for tensor in bucket.tensors)]
        self.nbytes = HEADER_BYTES + bucket.nbytes
        # What is sealed of them.
        self.parts = list(zip(self.names[1:], self.dtypes[1:], self.shapes[1:], strict=True))

    def views(self, flat: Tensor) -> list[Tensor]:
        """The tensors of the bucket within its bytes, uint8 [nbytes]."""
        views = []
        start = HEADER_BYTES
        for tensor in self._tensors:
            stop = start + tensor.nbytes
            views.append(flat[start:stop].view(tensor.dtype).reshape(lengths(tensor.box)))
            start = stop
        return views
