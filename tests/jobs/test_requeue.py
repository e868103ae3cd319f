"""What becomes of a job after its step: it goes on, or ends with a cause and an exit code."""

import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from jobs.requeue import JobNow, _lack_of_others, nodes_left, num_vain_requeues, obstacle
from jobs.submission import record_job
from nanoslime.run_dir import DONE, FAILED, STOPPED, Attempt, RunDir
from nanoslime.storage.shared_files import publish, publish_json, read_json
from nanoslime.types import RunError
from tests.jobs.made_run import HOSTILE, MadeRun, make_run
from tools.submit.batch_script import sbatch_text
from tools.submit.where import refuse_if_job_lives

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
        return not obstacle(attempt, RUNS, num_vain_requeues(run, "42"), max_requeues)

    lives = [has_room(f"42-{life}") for life in range(max_requeues + 1)]
    assert lives == [True] * max_requeues + [False]
    attempt = run.new_attempt("42-9")
    run.checkpoint(1).mkdir()
    broken(attempt)
    assert bool(obstacle(attempt, RUNS, num_vain_requeues(run, "42"), max_requeues)) == (
        max_requeues == 0
    )


def test_requeues_count_from_the_last_attempt_that_committed_a_new_step(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "run")

    def num_vain(job_id: str, *keys: str) -> int:
        for key in keys:
            run.new_attempt(key)
        return num_vain_requeues(run, job_id)

    assert num_vain("7", "6-0", "6-1", "77-0", "7-0") == 0
    assert num_vain("7", "7-1") == 1
    assert num_vain("7", "7-2", "7-3") == 3
    run.checkpoint(4).mkdir()
    assert num_vain("7") == 0
    assert num_vain("7", "7-4", "7-5") == 2
    assert num_vain("8", "8-0") == 0


def run_script(
    made: MadeRun, tmp_path: Path, step_code: int, answers: Mapping[str, str] = MappingProxyType({})
) -> tuple[int, str, str]:
    """Runs the batch script's shell part with commands of SLURM that record their call, and then do
    what `answers` say."""
    calls = tmp_path / "calls"
    answers = {"srun": f"exit {step_code}", "sbatch": "echo 43", "scontrol": ":"} | answers
    for name, answer in answers.items():
        program = tmp_path / name
        record = f'echo {name} "$@" >> {shlex.quote(str(calls))}'
        program.write_text(f"#!/bin/sh\n{record}\n{answer}\n")
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


def test_a_node_is_left_out_though_slurm_ends_the_commands_of_a_requeued_job(
    tmp_path: Path,
) -> None:
    """It sends SIGTERM to all processes of the batch step, also to those without a handler."""
    made = make_run(tmp_path, 2)
    attempt = made.run.new_attempt("42-1")
    publish_json(attempt.preflight, {"excluded": ["n2"]})
    broken(attempt)
    ends = "kill -TERM $$ $PPID; echo updated"
    answers = {"scontrol": f'case "$1" in requeue | update) {ends} > {tmp_path}/$1 ;; esac'}
    returned, calls, said = run_script(made, tmp_path, 137, answers)
    assert returned == DONE, said
    assert "requeued without n2 (1 of 10" in said
    assert "scontrol update JobId=42 ExcNodeList=n2" in calls
    assert (tmp_path / "update").exists()


@pytest.mark.parametrize(
    ("answer", "is_lack"),
    [
        ("sbatch: error: allocation failure: Requested node configuration is not available", True),
        ("sbatch: error: Batch job submission failed: Node count specification invalid", True),
        ("Required node not available (down, drained or reserved)", True),
        ("allocation failure: Requested nodes are busy", False),
        ("allocation failure: Requested time limit is invalid (missing or exceeds limit)", False),
        ("sbatch: error: Unable to contact slurm controller (connect failure)", False),
    ],
)
def test_only_slurms_words_for_it_are_a_lack_of_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, is_lack: bool
) -> None:
    made = make_run(tmp_path, 2, "cuda", gpu_request="gres:gpu", extra_sbatch={"constraint": "ib"})
    facts = {"NumNodes": "2", "Partition": "gpu", "Account": "(null)", "TimeLimit": "02:00:00"}
    facts |= {"Features": "a100", "Reservation": "maint"}
    program = tmp_path / "sbatch"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\necho "{answer}" >&2\nexit 1\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    said = _lack_of_others(made.run, facts, "n2")
    asked = set((tmp_path / "asked").read_text().split())
    assert {"--test-only", "--nodes=2", "--exclude=n2", "--partition=gpu"} <= asked
    assert {"--time=02:00:00", "--constraint=a100", "--reservation=maint"} <= asked
    assert "--gres=gpu:2" in asked
    assert bool(said) == is_lack
    program.unlink()
    assert _lack_of_others(made.run, facts, "n2") == ""


def test_a_site_that_forbids_requeues_has_a_job_after_the_job(tmp_path: Path) -> None:
    made = make_run(tmp_path, 1, resume_by="chain", max_requeues=2)
    publish(made.run.batch_script, b"the script")
    record_job(made.run, "42")
    broken(made.run.new_attempt("42-1"))
    returned, calls, said = run_script(made, tmp_path, 137)
    assert returned == DONE, said
    assert "goes on in job 43 (1 of 2 in a row without a new commit)" in said
    assert "sbatch --parsable --dependency=afterany:42" in calls
    assert "scontrol requeue" not in calls
    assert read_json(made.run.job) == {"job_id": "43", "jobs": ["42", "43"]}
    # What one job could not do counts for the next one.
    for attempt in (made.run.new_attempt("43-0"), made.run.new_attempt("44-0")):
        broken(attempt)
    assert num_vain_requeues(made.run, "43") == 1
    record_job(made.run, "44", after="43")
    assert num_vain_requeues(made.run, "44") == 2
    # As each job does when it starts.
    record_job(made.run, "44")
    assert num_vain_requeues(made.run, "44") == 2
    # A person has submitted this one.
    record_job(made.run, "50")
    made.run.new_attempt("50-0")
    assert num_vain_requeues(made.run, "50") == 0


def lose(attempt: Attempt, *nodes: int) -> None:
    for node in nodes:
        publish_json(attempt.lost(node), {"name": f"n{node + 1}"})


@pytest.mark.parametrize(
    ("lost", "listed", "left"),
    [
        ([1], "n1 n3 n4", "n1 n3 n4"),
        # SLURM has not noticed yet, or has noticed more.
        ([1], "n1 n2 n3 n4", "n1 n3 n4"),
        ([], "n1 n2 n4", "n1 n2 n4"),
        ([3], "n1 n2 n3", "n1 n2 n3"),
        ([], "n1 n2 n3 n4", ""),
        ([1, 2], "n1 n2 n3 n4", ""),
        ([0], "n2 n3 n4", ""),
        ([1], "", ""),
    ],
)
def test_an_attempt_that_has_lost_nodes_goes_on_where_trainers_and_an_engine_have_room(
    tmp_path: Path, lost: list[int], listed: str, left: str
) -> None:
    attempt = make_run(tmp_path, 4).run.new_attempt("42-0", 4)
    lose(attempt, *lost)
    assert nodes_left(attempt, listed.split()) == left.split()


def test_an_attempt_on_fewer_nodes_has_their_layout_and_may_lose_no_more(tmp_path: Path) -> None:
    made = make_run(tmp_path, 4)
    attempt = made.run.new_attempt("42-0", 3)
    assert attempt.layout == made.layout.on(3)
    assert len(attempt.layout.engines) == 1
    lose(attempt, 1)
    assert nodes_left(attempt, ["n1", "n3"]) == []


def test_a_batch_script_goes_on_in_place_where_a_node_is_lost(tmp_path: Path) -> None:
    made = make_run(tmp_path, 4)
    attempt = made.run.new_attempt("42-1", 4)
    broken(attempt)
    lose(attempt, 1)
    second = shlex.join(
        [
            sys.executable,
            "-c",
            "from pathlib import Path; from nanoslime.run_dir import RunDir; import sys; "
            "run = RunDir.open(Path(sys.argv[1])); "
            "run.latest_attempt().number == 1 and run.new_attempt('42-1', 3).end(0, '')",
            str(made.run.path),
        ]
    )
    # The step of the script has been; that of the new attempt begins one.
    answers = {
        "srun": f'case "$*" in *nodelist*) {second} ;; esac; exit 1',
        "scontrol": 'case "$2" in job) echo NodeList=n[1,3-4] ;; *) echo n1 n3 n4 ;; esac',
    }
    returned, calls, said = run_script(made, tmp_path, 137, answers)
    assert returned == DONE, said
    assert "goes on without the lost nodes, on n1, n3, n4 (1 of 10 in a row" in said
    step = next(line for line in calls.splitlines() if "--nodelist=n1,n3,n4" in line)
    assert "--nodes=3 --ntasks=3" in step
    assert step.index("--nodelist") < step.index("jobs.node")
    assert "requeue" not in calls
    # One whose step does not even begin an attempt is not tried for ever.
    made.run.new_attempt("42-1", 4).end(FAILED, "lost", can_go_on=True)
    lose(made.run.attempt(3), 1)
    returned, calls, said = run_script(made, tmp_path, 137, answers)
    assert returned == FAILED
    assert "before it began an attempt" in said


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
