"""Which optimizer steps are left out, by the gradient norms of those before them."""

import math
from collections import deque
from statistics import median
from typing import Any

WINDOW, LEAST = 128, 16


class StepGuard:
    """Judges gradient norms. One that is not finite is never accepted.

    Nor, with a `limit`, is one above `limit` times the median of the last WINDOW accepted norms, once there
    are LEAST of them.
    """

    def __init__(self, limit: float | None) -> None:
        self._limit = math.inf if limit is None else limit
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self.num_skipped = 0

    def accepts(self, norm: float) -> bool:
        """Whether to make the step of this gradient norm; remembers norm and answer."""
        most = self._limit * median(self._norms) if len(self._norms) >= LEAST else math.inf
        if (
            math.isfinite(norm) and not norm > most
        ):  # where all norms are 0 and there is no limit, most is nan
            self._norms.append(norm)
            return True
        self.num_skipped += 1
        return False

    def state(self) -> dict[str, Any]:
        """What belongs in a checkpoint."""
        return {"num_skipped": self.num_skipped, "norms": list(self._norms)}

    def restore(self, state: dict[str, Any]) -> None:
        self.num_skipped, self._norms = state["num_skipped"], deque(state["norms"], WINDOW)
