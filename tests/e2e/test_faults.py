"""A run that samples ahead of its training, with all its real parts, is stopped in the middle of
a take, killed as a whole, and loses the process of a rollout worker.
"""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from nanoslime.rollout import recorder
from nanoslime.run_dir import STOPPED, RunDir
from tests import process_table
from tests.e2e import test_rehearsal
from tests.e2e.test_rehearsal import Rehearsal, json_lines

pytestmark = [
    pytest.mark.matrix,
    pytest.mark.ray,
    pytest.mark.megatron,
    pytest.mark.sglang,
    pytest.mark.timeout(900),
]
start = test_rehearsal.start  # the fixture
NUM_ROLLOUT = 8
BATCH = 8
SMALL = f"""--pp-size 1 --max-staleness 1 --rollout-batch-size {BATCH} --save-interval 2
    --n-samples-per-prompt 4 --eval.max-prompts 8 --algorithm.filter-zero-std=false""".split()


TWO_WORKERS = ["--nodes", "3", "--cluster.rollout-nodes", "2"]
ONE_WORKER = ["--nodes", "2"]


def kill_all(rehearsal: Rehearsal) -> None:
    """Ends every process of it at once, as a node does that loses its power."""
    family = process_table.descendants(rehearsal.process.pid, process_table.all_processes())
    for pid in [rehearsal.process.pid, *(process.pid for process in family)]:
        os.kill(pid, signal.SIGKILL)
    rehearsal.process.wait(30)


def waits_in_a_take(run: RunDir) -> bool:
    status = run.status()
    return status["phase"] == "generate" and time.time() - status["time"] > 5


def check_groups(run: RunDir) -> None:
    """All are there once, each of a prompt of its own, and no token is beyond the bound."""
    found = {}
    for step in range(NUM_ROLLOUT):
        groups = recorder.load(run.rollouts, step)
        assert len(groups) == BATCH
        for group in groups:
            assert group.group_id not in found
            found[group.group_id] = group.samples[0].metadata["prompt_id"]
            for sample in group.samples:
                assert {version for _, version in sample.policy_versions} <= {step - 1, step}
    assert sorted(found) == list(range(NUM_ROLLOUT * BATCH))
    assert len(set(found.values())) == len(found)


def test_a_run_that_is_stopped_in_a_take_and_then_killed_loses_nothing(start, tmp_path: Path):
    hold = tmp_path / "hold"
    environment = ["--environment", "tests.e2e.held_environment:run"]
    environment += ["--environment-options", json.dumps({"hold": str(hold)})]
    stopped = start(*SMALL, *TWO_WORKERS, *environment, "--num-rollout", str(NUM_ROLLOUT))
    stopped.wait_for_line(f"step 2/{NUM_ROLLOUT}")
    hold.touch()
    run = stopped.run
    assert process_table.wait_for(lambda: waits_in_a_take(run), 120)
    begin = time.monotonic()
    stopped.process.send_signal(signal.SIGUSR2)
    assert stopped.wait(90) == STOPPED, "".join(stopped.lines)
    print(f"\nstopped in a take after {time.monotonic() - begin:.1f} s", end="")
    num_done = run.status()["step"]
    driver = json.loads((run.checkpoint(num_done) / "driver.json").read_text())
    assert len(driver["rollout"]["producer"]["admission"]["oldest"]) == 2 * BATCH
    assert driver["rollout"]["producer"]["num_files"] == 2
    hold.unlink()

    killed = start("--resume", str(run.path))
    killed.wait_for_line(f"step {num_done + 3}/{NUM_ROLLOUT}")
    kill_all(killed)
    print(f"; killed after {len(json_lines(run.metrics))} steps", end="")
    # A run that is not known to have ended counts as running for a minute.
    last_beat = max(beat["time"] for beat in run.attempt(2).heartbeats().values())
    process_table.wait_for(lambda: time.time() > last_beat + 62, 90)

    resumed = start("--resume", str(run.path))
    assert resumed.wait(280) == 0, "".join(resumed.lines)
    assert [row["step"] for row in json_lines(run.metrics)] == list(range(NUM_ROLLOUT))
    check_groups(run)


def kill_worker(rehearsal: Rehearsal, number: int) -> Path:
    """Kills the process of a rollout worker while a step is made; returns its log."""
    rehearsal.wait_for_line("step 1/1000")
    log = rehearsal.run.attempt(1).log("worker", number)
    [pid] = re.findall(rf"rollout worker {number}, pid (\d+)", log.read_text())
    os.kill(int(pid), signal.SIGKILL)
    return log


def test_a_killed_rollout_worker_ends_the_run_with_its_name_where_it_is_the_only_one(start):
    rehearsal = start(*SMALL, *ONE_WORKER, "--num-rollout", "1000")
    log = kill_worker(rehearsal, 0)
    begin = time.monotonic()
    assert rehearsal.wait(90) == 1
    print(f"\nended after {time.monotonic() - begin:.1f} s", end="")
    [line] = [line for line in rehearsal.lines if line.startswith("failed:")]
    print("; " + line, end="")
    died = "rollout worker 0 on node 1 died while asked to"
    # A trainer may miss its arrays before anybody asks the worker for something.
    missed = "by rollout worker 0 cannot be fetched, because its process has died"
    assert (died in line and log.name in line) or missed in line
    assert "Traceback" not in line and "call()" not in line


def test_a_run_goes_on_without_a_killed_rollout_worker_which_comes_back(start):
    rehearsal = start(*SMALL, *TWO_WORKERS, "--num-rollout", "1000")
    rehearsal.wait_for_line("step 2/1000")
    assert process_table.wait_for(lambda: rehearsal.run.status()["phase"] == "generate", 60)
    begin = time.monotonic()
    log = kill_worker(rehearsal, 1)
    rehearsal.wait_for_line("step 4/1000")
    print(f"\ntwo steps more after {time.monotonic() - begin:.1f} s", end="")

    def is_back() -> bool:
        return json_lines(rehearsal.run.metrics)[-1]["engines/ready"] == 2.0

    assert process_table.wait_for(is_back, 120), "".join(rehearsal.lines)
    print(f"; back after {time.monotonic() - begin:.1f} s", end="")
    assert len(re.findall(r"rollout worker 1, pid \d+", log.read_text())) == 2
