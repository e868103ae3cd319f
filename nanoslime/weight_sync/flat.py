"""How a bucket lies in one flat tensor of bytes, after its header (sealed_bucket.py)."""

import torch
from torch import Tensor

from nanoslime.sealed_bucket import HEADER, HEADER_BYTES, HEADER_WORDS
from nanoslime.weight_sync.plan import Bucket


class FlatBucket:
    """How a bucket lies in a flat tensor; names, dtypes and shapes are those that engines get."""

    def __init__(self, bucket: Bucket) -> None:
        self._tensors = bucket.tensors
        self.names = [HEADER, *(tensor.name for tensor in bucket.tensors)]
        self.dtypes = [torch.int64, *(tensor.dtype for tensor in bucket.tensors)]
        self.shapes = [(HEADER_WORDS,), *(tensor.shape for tensor in bucket.tensors)]
        self.nbytes = HEADER_BYTES + bucket.nbytes
        # What is sealed of them.
        self.parts = [(tensor.name, tensor.dtype, tensor.shape) for tensor in bucket.tensors]

    def views(self, flat: Tensor) -> list[Tensor]:
        """The tensors of the bucket within its bytes, uint8 [nbytes]."""
        views = []
        start = HEADER_BYTES
        for tensor in self._tensors:
            stop = start + tensor.nbytes
            views.append(flat[start:stop].view(tensor.dtype).reshape(tensor.shape))
            start = stop
        return views
