"""The trainer's weights as a rank of it sees them: its own shards, and who has the others."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import torch

from nanoslime.batch import OwnedShard, WeightShard
from nanoslime.models.rules import FLOAT32
from nanoslime.types import TensorKind
from nanoslime.weight_sync.plan import Bucket, Targets, make_sync_plan


@dataclass(frozen=True)
class TrainerWeights:
    """What all ways of weights have in common on a rank.

    `shards` gives this rank's shards with their current values, `owned` what each rank holds.
    Shards meet on `device`, as `dtype`; some tensors are always float32.
    """

    shards: Callable[[], Iterable[WeightShard]]
    owned: Sequence[Sequence[OwnedShard]]
    rank: int
    dtype: torch.dtype
    device: torch.device
    _plans: dict[tuple, tuple[Bucket, ...]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Raises ValueError where this rank does not hold what the others think it does."""
        held = [OwnedShard(s.name, s.full_shape, s.slices) for s in self.shards()]
        for mine, theirs in zip_longest(held, self.owned[self.rank]):
            if mine != theirs:
                raise ValueError(f"trainer rank {self.rank} holds {mine}, not {theirs}")

    def plan(
        self, targets_of: Targets, bucket_bytes: int, *, spreads: bool = False
    ) -> tuple[Bucket, ...]:
        """The same on every rank; see make_sync_plan. It is made once: with many experts that
        takes seconds.
        """
        asked = (targets_of, bucket_bytes, spreads)
        if asked not in self._plans:
            self._plans[asked] = make_sync_plan(
                self.owned, self._dtype_of, bucket_bytes, targets_of, spreads=spreads
            )
        return self._plans[asked]

    def kinds(self) -> list[TensorKind]:
        """What engines are sent, each tensor whole."""
        shapes = {shard.name: shard.full_shape for shards in self.owned for shard in shards}
        return [(name, str(self._dtype_of(name)), tuple(shape)) for name, shape in shapes.items()]

    def _dtype_of(self, name: str) -> torch.dtype:
        return torch.float32 if name.endswith(FLOAT32) else self.dtype
