"""Which optimizer steps are left out: a decision by the gradient norms of earlier steps."""

import math
from dataclasses import dataclass, field
from statistics import median

WINDOW = 128  # so many accepted norms are remembered
LEAST = 16  # so many there must be before a limit is applied
# So many refusals in a row are no outliers: the history begins anew.
MOST_REFUSED = 8


@dataclass
class StepHistory:
    """What a rank remembers of its optimizer steps. A checkpoint holds it."""

    optimizer_step: int = 0  # steps so far, skipped ones included
    num_skipped: int = 0
    # The gradient norms of the last WINDOW accepted steps.
    norms: list[float] = field(default_factory=list)
    # How many finite norms have been above the limit since the last accepted one.
    num_refused: int = 0

    def accepts(self, norm: float, limit: float | None) -> bool:
        """Whether the step with the gradient norm `norm` is made; counts or remembers it.

        A norm that is not finite is refused. With a `limit`, a norm above `limit` x the
        median of `norms` is refused as well, once there are LEAST of them. After
        MOST_REFUSED refusals in a row for being too large, `norms` begins anew.
        """
        if not math.isfinite(norm):
            self.num_skipped += 1
            return False
        if norm <= self._largest_accepted(limit):
            self.norms = [*self.norms, norm][-WINDOW:]
            self.num_refused = 0
            return True
        self.num_skipped += 1
        self.num_refused += 1
        if self.num_refused == MOST_REFUSED:
            self.norms = []
            self.num_refused = 0
        return False

    def _largest_accepted(self, limit: float | None) -> float:
        if limit is None or len(self.norms) < LEAST:
            return math.inf
        return limit * median(self.norms)
