"""`nanoslime.train` whose trainer rank 1 fails in its third step, while rank 0 waits for
it in a collective and rank 2 is busy. With LATE_RANK in the environment rank 1 is busy too.
"""

import os
import sys
import time

from nanoslime import train
from nanoslime.training.fsdp import FSDPBackend

if __name__ == "__main__":
    rank = os.environ["RANK"]
    if rank in ("1", "2"):
        train_step = FSDPBackend.train_step
        steps = iter(range(3))

        def failing(backend, shard, algorithm):
            if next(steps) == 2:
                if rank == "1" and "LATE_RANK" not in os.environ:
                    raise RuntimeError("no memory in the third step")
                time.sleep(60)  # torchrun ends it sooner
            return train_step(backend, shard, algorithm)

        FSDPBackend.train_step = failing
    code = train.main(sys.argv[1:])
    if rank == "1":
        os._exit(code)  # torchrun hears of it at once
    sys.exit(code)
