"""SLURM is asked seldom, never for long, and never in vain twice."""

import os
import time

import pytest

from tests.tools.watch.watched import stand_in
from tools.watch import slurm_queue
from tools.watch.slurm_queue import Job, find_job

ANSWER = """cat <<'END'
11|PENDING|ReqNodeNotAvail, UnavailableNodes:n[1-2]|1:00:00 left on
12|RUNNING|None|UNLIMITED left on n[3-4,7]
END"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nanoslime"


def asked(calls) -> int:
    return len(calls.read_text().splitlines())


def test_one_answer_serves_all_jobs_of_a_user_for_30_s(programs, own_cache):
    calls = stand_in(programs, "squeue", ANSWER)
    waiting = find_job("11", 1000)
    assert waiting.waits and not waiting.runs
    assert waiting.reason == "ReqNodeNotAvail, UnavailableNodes:n[1-2]"
    running = find_job("12", 1000)
    assert running.runs and running.time_and_nodes == "UNLIMITED left on n[3-4,7]"
    assert find_job("1", 1000) == Job("1", "not in the queue any more")
    assert asked(calls) == 1
    [cache] = own_cache.iterdir()
    assert cache.stat().st_mode & 0o777 == 0o600
    for age_s, num_asked in ((29.0, 1), (31.0, 2), (-5.0, 3)):
        os.utime(cache, (time.time() - age_s,) * 2)
        assert find_job("12", 1000).runs
        assert asked(calls) == num_asked


def test_users_and_clusters_are_told_apart(programs, monkeypatch):
    calls = stand_in(programs, "squeue", ANSWER)
    find_job("11", 1000)
    find_job("11", 1001)
    monkeypatch.setenv("SLURM_CONF", "/elsewhere/slurm.conf")
    find_job("11", 1000)
    assert asked(calls) == 3
    assert ["--user=1000" in line for line in calls.read_text().splitlines()] == [True, False, True]


@pytest.mark.parametrize(
    ("script", "state"),
    [
        ("exec sleep 60", "squeue did not answer within 0.3 s"),
        (
            "echo 'slurm_load_jobs error: no contact' >&2; exit 1",
            "squeue: slurm_load_jobs error: no contact",
        ),
        ("echo '|||'; echo gibberish; printf '12|RUN'", "not in the queue any more"),
    ],
)
def test_a_slurm_that_does_not_answer_is_not_asked_again_at_once(
    programs, monkeypatch, script, state
):
    monkeypatch.setattr(slurm_queue, "_ANSWER_DEADLINE_S", 0.3)
    calls = stand_in(programs, "squeue", script)
    begin = time.monotonic()
    for _ in range(3):
        job = find_job("12", 1000)
        assert job.state == state and not job.runs and not job.waits
    assert time.monotonic() - begin < 5
    assert asked(calls) == 1


def test_a_machine_without_slurm_and_a_home_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert find_job("12", 1000).state == "there is no squeue here"
