"""Hands weights to the embedded engine in the process of the only trainer rank."""

from nanoslime.weight_sync.transport import EngineSide, RankSide, Sent


class InProcessSender:
    """A `Sender`. The engine copies the tensors and takes their version in one call."""

    def __init__(self, rank: RankSide, engines: EngineSide):
        self._weights = rank.weights
        [self._engine] = engines.engines

    def prepare(self, version: int) -> None: ...

    def send(self, version: int, *, compares: bool = False) -> Sent:
        tensors = dict(self._weights.whole_tensors())
        self._engine.load_weights(tensors.items(), version)
        return Sent(sum(tensor.nbytes for tensor in tensors.values()))

    def close(self) -> None: ...
