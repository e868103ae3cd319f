"""Ranks act one after another, in an order that all of them know: no lock that could leak."""

from datetime import timedelta

import torch.distributed as dist

_WELL = b"well"
_FAILED = b"failed"


class Turns:
    """The turns of one sync. A key of the store says that the turn before is over."""

    def __init__(self, store: dist.Store, sync: int, deadline_s: float) -> None:
        self._store = store
        self._sync = sync
        self._deadline = timedelta(seconds=deadline_s)

    def wait(self, turn: int) -> bool:
        """Waits until the turn before is over; False where it failed, or one before it.

        Raises RuntimeError after the deadline.
        """
        if turn == 0:
            return True
        key = self._key(turn)
        self._store.wait([key], self._deadline)
        went_well = self._store.get(key) == _WELL
        self._store.delete_key(key)
        return went_well

    def over(self, turn: int, *, well: bool) -> None:
        """The next turn may begin."""
        self._store.set(self._key(turn + 1), _WELL if well else _FAILED)

    def _key(self, turn: int) -> str:
        return f"{self._sync}/{turn}"
