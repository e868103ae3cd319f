"""Two runs of one user on the same nodes do not clash, however close they start."""

import json
import os
import time
from pathlib import Path

import pytest

from nanoslime.run_dir import DONE, RunDir
from tests import process_table
from tests.e2e import test_rehearsal
from tests.jobs.made_run import scratches

pytestmark = [pytest.mark.matrix, pytest.mark.ray, pytest.mark.timeout(600)]
start = test_rehearsal.start  # the fixture
SMALL = """--cluster.slots-per-node 1 --engine embedded --backend fsdp --tp-size 1 --pp-size 1
    --num-rollout 4 --save-interval 2 --eval.max-prompts 8 --rollout-batch-size 8""".split()


def shared_names() -> set[str]:
    return set(os.listdir("/dev/shm"))


@pytest.mark.parametrize(("apart_s", "num_nodes"), [(0.0, 2), (0.5, 1), (2.0, 1), (4.0, 1)])
def test_two_runs_that_start_together_both_end_right(
    start, tmp_path: Path, apart_s: float, num_nodes: int
) -> None:
    """They have the same name, run_root and addresses."""
    before = shared_names()
    flags = [*SMALL, "--nodes", str(num_nodes)]
    first = start(*flags)
    time.sleep(apart_s)
    second = start(*flags)
    began = {}

    def both_have_ray() -> bool:
        for head in tmp_path.glob("rehearsal*/attempts/1/head.json"):
            began[head] = json.loads(head.read_text())["ray_address"]
        return len(began) == 2 or first.process.poll() or second.process.poll()

    process_table.wait_for(both_have_ray, 120)
    for run in (first, second):
        assert run.wait(240) == DONE, "".join(run.lines)
    assert len(set(began.values())) == 2, "each has a Ray of its own"
    runs = [RunDir.open(path) for path in tmp_path.glob("rehearsal*")]
    assert len(runs) == 2
    for run in runs:
        assert run.status()["phase"] == "done"
        assert run.latest_attempt().number == 1
        steps = [row["step"] for row in test_rehearsal.json_lines(run.metrics)]
        assert steps == [0, 1, 2, 3]
        assert run.checkpoint(4).is_dir()
    assert scratches(tmp_path) == []
    assert shared_names() <= before
