"""Hands weights to the embedded engine in the process of the only trainer rank."""

import sys

import torch

from nanoslime.weight_sync.exchange import Exchange
from nanoslime.weight_sync.plan import whole_on_first
from nanoslime.weight_sync.transport import EngineSide, RankSide, Sent


class InProcessSender:
    """A `Sender`. The engine copies the tensors and takes their version in one call."""

    def __init__(self, rank: RankSide, engines: EngineSide):
        self._weights = rank.weights
        [self._engine] = engines.engines
        [self._everything] = rank.weights.plan(whole_on_first, bucket_bytes=sys.maxsize)
        self._exchange = Exchange([self._everything], rank.weights.rank, rank.weights.device)

    def prepare(self, version: int) -> None: ...

    def send(self, version: int, *, compares: bool = False) -> Sent:
        device = self._weights.device
        tensors = {
            tensor.name: torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            for tensor in self._everything.tensors
        }
        self._exchange.bring(0, list(self._weights.shards()), list(tensors.values()))
        self._engine.load_weights(tensors.items(), version)
        return Sent(self._everything.nbytes)

    def close(self) -> None: ...
