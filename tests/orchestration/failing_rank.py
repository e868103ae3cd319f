"""`nanoslime.train` whose trainer rank 1 fails in its third step, while rank 0 waits for
it in a collective.
"""

import os
import sys

from nanoslime import train
from nanoslime.training.fsdp import FSDPBackend

if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        train_step = FSDPBackend.train_step
        steps = iter(range(3))

        def failing(backend, shard, algorithm):
            if next(steps) == 2:
                raise RuntimeError("no memory in the third step")
            return train_step(backend, shard, algorithm)

        FSDPBackend.train_step = failing
    sys.exit(train.main(sys.argv[1:]))
