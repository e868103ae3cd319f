"""Which optimizer steps are left out, by the gradient norms of those before them."""

import math
from dataclasses import dataclass, field
from statistics import median

WINDOW, LEAST, MOST_REFUSED = 128, 16, 8


@dataclass
class Progress:
    """What a checkpoint holds of a rank's past beside tensors and random state."""

    step: int = 0  # of the optimizer, skipped ones included
    num_skipped: int = 0
    norms: list[float] = field(default_factory=list)  # the last WINDOW accepted ones
    num_refused: int = 0  # above the limit, since the last accepted one

    def accepts(self, norm: float, limit: float | None) -> bool:
        """Whether to make the step of this gradient norm, which is counted or remembered.

        Not if it is not finite; nor, with a `limit`, if it is above `limit` x the median of `norms`, once
        there are LEAST of them. MOST_REFUSED in a row are no outliers: `norms` then begins anew.
        """
        most = limit * median(self.norms) if limit and len(self.norms) >= LEAST else math.inf
        accepted = math.isfinite(norm) and norm <= most
        if accepted:
            self.norms = [*self.norms, norm][-WINDOW:]
        self.num_refused = 0 if accepted else self.num_refused + math.isfinite(norm)
        if self.num_refused == MOST_REFUSED:
            self.norms, self.num_refused = [], 0
        self.num_skipped += not accepted
        return accepted
