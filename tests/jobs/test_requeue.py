"""What becomes of a job after its step: it goes on, or ends with a cause and an exit code."""

import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.requeue import JobNow, obstacle
from jobs.sbatch import sbatch_text
from jobs.where import refuse_if_job_lives
from nanoslime.run_dir import DONE, FAILED, STOPPED, Attempt, RunDir
from nanoslime.storage.shared_files import publish_json
from nanoslime.types import RunError
from tests.jobs.made_run import HOSTILE, MadeRun, make_run

RUNS = JobNow()
CANCELLED = JobNow(is_over=True)
MUST_LEAVE = JobNow(must_leave=True)


def warned(attempt: Attempt) -> None:
    attempt.request_stop("SIGUSR2 at n1", requeue=True)
    attempt.end(STOPPED, "SIGUSR2 at n1")


def warned_and_ended(attempt: Attempt) -> None:
    attempt.request_stop("SIGUSR2 at n1", requeue=True)
    attempt.request_stop("SIGTERM at n1")
    attempt.end(STOPPED, "SIGUSR2 at n1")


def broken(attempt: Attempt) -> None:
    attempt.end(FAILED, "the driver was killed by SIGKILL", can_go_on=True)


def broken_and_ended(attempt: Attempt) -> None:
    """srun ends the tasks of the other nodes by SIGTERM, when that of one is killed."""
    broken(attempt)
    attempt.request_stop("SIGTERM at n1")


def wrong(attempt: Attempt) -> None:
    attempt.end(FAILED, "data.reward: no module named x")


def wrong_while_warned(attempt: Attempt) -> None:
    attempt.request_stop("SIGUSR2 at n1", requeue=True)
    wrong(attempt)


def silent(attempt: Attempt) -> None:
    """All agents were killed."""


@pytest.mark.parametrize(
    ("ends", "job", "says"),
    [
        (warned, RUNS, ""),
        (warned, MUST_LEAVE, ""),
        (warned, CANCELLED, "cancelled or requeued"),
        (warned_and_ended, RUNS, "asked to end: SIGTERM at n1"),
        (warned_and_ended, CANCELLED, "cancelled or requeued"),
        (warned_and_ended, MUST_LEAVE, ""),
        (broken, RUNS, ""),
        (broken_and_ended, RUNS, ""),
        (broken, CANCELLED, "cancelled or requeued"),
        (silent, RUNS, ""),
        (wrong, RUNS, "would fail in the same way"),
        (wrong, MUST_LEAVE, "would fail in the same way"),
        (wrong_while_warned, RUNS, "would fail in the same way"),
    ],
)
def test_a_job_goes_on_where_no_person_and_no_setting_stands_in_the_way(
    tmp_path: Path, ends: Callable[[Attempt], None], job: JobNow, says: str
) -> None:
    attempt = RunDir.create(tmp_path, "run").new_attempt("42-0")
    ends(attempt)
    why_not = obstacle(attempt, job, 0, 3)
    assert says in why_not
    assert bool(says) == bool(why_not)


def test_an_attempt_that_a_newer_one_has_followed_never_requeues_its_job(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "run")
    attempt = run.new_attempt("42-0")
    broken(attempt)
    run.new_attempt("42-1")
    assert obstacle(attempt, RUNS, 0, 3) == "a newer attempt has begun"


@pytest.mark.parametrize("max_requeues", [0, 1, 2])
def test_requeues_are_bounded_in_a_row_without_a_commit(tmp_path: Path, max_requeues: int) -> None:
    run = RunDir.create(tmp_path, "run")

    def has_room(key: str) -> bool:
        attempt = run.new_attempt(key)
        broken(attempt)
        return not obstacle(attempt, RUNS, run.num_vain_requeues("42"), max_requeues)

    lives = [has_room(f"42-{life}") for life in range(max_requeues + 1)]
    assert lives == [True] * max_requeues + [False]
    attempt = run.new_attempt("42-9")
    run.checkpoint(1).mkdir()
    broken(attempt)
    assert bool(obstacle(attempt, RUNS, run.num_vain_requeues("42"), max_requeues)) == (
        max_requeues == 0
    )


def run_script(made: MadeRun, tmp_path: Path, step_code: int) -> tuple[int, str, str]:
    """Runs the batch script's shell part with srun and scontrol that only record their call."""
    calls = tmp_path / "calls"
    for name, code in (("srun", step_code), ("scontrol", 0)):
        program = tmp_path / name
        record = f'echo {name} "$@" >> {shlex.quote(str(calls))}'
        program.write_text(f"#!/bin/sh\n{record}\nexit {code}\n")
        program.chmod(0o755)
    text = sbatch_text(made.config, made.layout, made.run.path)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "42", "SLURM_RESTART_COUNT": "1"}
    done = subprocess.run(["bash"], input=text, text=True, env=env, timeout=60, capture_output=True)
    return done.returncode, calls.read_text(), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("ends", "step_code", "code", "told"),
    [
        (lambda attempt: attempt.end(DONE, ""), 137, 0, ""),
        (broken, 137, 0, "killed by SIGKILL; requeued (2 of 10 in a row without a new commit)"),
        (wrong, 1, 1, "no module named x; not requeued: another attempt would fail"),
        (warned_and_ended, 0, STOPPED, "not requeued: the run was asked to end: SIGTERM at n1"),
        (silent, 0, 0, "its agents ended without saying why; requeued"),
    ],
    ids=["done", "broken", "wrong", "ended", "silent"],
)
def test_a_batch_script_requeues_or_fails_with_the_cause(
    tmp_path: Path, ends: Callable[[Attempt], object], step_code: int, code: int, told: str
) -> None:
    made = make_run(tmp_path / HOSTILE, 1)
    made.run.new_attempt("42-0")
    ends(made.run.new_attempt("42-1"))
    returned, calls, said = run_script(made, tmp_path, step_code)
    assert returned == code, said
    assert told in said
    assert ("scontrol requeue 42" in calls) == ("; requeued" in told)


def test_a_step_that_never_began_an_attempt_fails_its_job(tmp_path: Path) -> None:
    made = make_run(tmp_path, 1)
    returned, calls, said = run_script(made, tmp_path, 0)
    assert returned == FAILED
    assert "before it began an attempt" in said
    assert "requeue" not in calls


@pytest.mark.parametrize(
    ("facts", "now"),
    [
        ("JobState=RUNNING RunTime=00:59:59 TimeLimit=01:00:00 PreemptTime=None", RUNS),
        ("JobState=RUNNING RunTime=23:59:59 TimeLimit=1-00:00:00", RUNS),
        ("JobState=RUNNING RunTime=9-23:59:59 TimeLimit=10-00:00:00 PreemptTime=None", RUNS),
        ("JobState=RUNNING RunTime=10-00:00:00 TimeLimit=UNLIMITED PreemptTime=None", RUNS),
        ("JobState=COMPLETING RunTime=01:00:03 TimeLimit=01:00:00", MUST_LEAVE),
        ("JobState=COMPLETING RunTime=10-00:00:01 TimeLimit=9-00:00:00", MUST_LEAVE),
        ("JobState=COMPLETING RunTime=00:00:09 TimeLimit=01:00:00", CANCELLED),
        ("JobState=SIGNALING RunTime=00:00:09 PreemptTime=2026-11-28T14:14:29", MUST_LEAVE),
        ("", RUNS),
    ],
)
def test_what_scontrol_says_of_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, facts: str, now: JobNow
) -> None:
    """As SLURM 22.05 says it; nothing where it does not answer."""
    program = tmp_path / "scontrol"
    program.write_text(f"#!/bin/sh\necho {shlex.quote(facts)}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert JobNow.of("42") == now


def squeue(folder: Path, output: str, code: int = 0) -> None:
    program = folder / "squeue"
    program.write_text(f"#!/bin/sh\necho {shlex.quote(output)}\nexit {code}\n")
    program.chmod(0o755)


def test_a_run_is_held_while_squeue_shows_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    run = RunDir.create(tmp_path, "run")
    squeue(tmp_path, "1042 PENDING BeginTime\n42 COMPLETING None")
    assert not refuse_if_job_lives(run)
    publish_json(run.job, {"job_id": "42"})
    with pytest.raises(RunError, match=r"job 42 still holds .* COMPLETING \(None\).*scancel 42"):
        refuse_if_job_lives(run)
    publish_json(run.job, {"job_id": "1042"})
    with pytest.raises(RunError, match=r"job 1042 still holds .* PENDING \(BeginTime\)"):
        refuse_if_job_lives(run)
    publish_json(run.job, {"job_id": "104"})
    assert refuse_if_job_lives(run)
    squeue(tmp_path, "", code=1)
    with pytest.raises(RunError, match="cannot say whether job 104 of"):
        refuse_if_job_lives(run)
    monkeypatch.setenv("PATH", "/nowhere")
    assert not refuse_if_job_lives(run)
