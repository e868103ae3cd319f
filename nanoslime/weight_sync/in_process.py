"""Hands weights to the embedded engine in the process of the only trainer rank."""

from nanoslime.weight_sync.transport import EngineSide, RankSide


class InProcessSender:
    """A `Sender`. The engine copies the tensors and takes their version in one call."""

    def __init__(self, rank: RankSide, engines: EngineSide):
        self._assembler = rank.assembler
        [self._engine] = engines.engines

    def send(self, version: int) -> int:
        self._engine.load_weights(self._assembler.tensors(), version)
        return sum(tensor.nbytes for tensor in self._assembler.plan.tensors)

    def close(self) -> None: ...
