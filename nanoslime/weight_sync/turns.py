"""Ranks act one after another, in an order that all of them know: no lock that could leak."""

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from nanoslime.types import MachineFailure

_WELL = b"well"
_FAILED = b"failed"


class Turns:
    """The turns of one sync; `ranks` has the rank of each.

    A key of the store says that the turn before is over.
    """

    def __init__(
        self, store: dist.Store, sync: str, ranks: Sequence[int], deadline_s: float
    ) -> None:
        self._store = store
        self._sync = sync
        self._ranks = ranks
        self._deadline_s = deadline_s

    def wait(self, turn: int) -> bool:
        """Waits until the turn before is over; False where it failed, or one before it.

        Raises RunError that names its rank after the deadline, or where the store is gone.
        """
        if turn == 0:
            return True
        key = self._key(turn)
        try:
            self._store.wait([key], timedelta(seconds=self._deadline_s))
            went_well = self._store.get(key) == _WELL
            self._store.delete_key(key)
        except RuntimeError as e:
            raise MachineFailure(
                f"trainer rank {self._ranks[turn - 1]} did not say within {self._deadline_s:g}s "
                f"that its turn {turn - 1} of {len(self._ranks)} to send weights is over: {e}"
            ) from e
        return went_well

    def over(self, turn: int, *, well: bool) -> None:
        """The next turn may begin."""
        self._store.set(self._key(turn + 1), _WELL if well else _FAILED)

    def _key(self, turn: int) -> str:
        return f"{self._sync}/{turn}"
