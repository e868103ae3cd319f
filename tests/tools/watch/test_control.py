"""A shell in a run, tunnels to it, its end and its upload."""

import getpass
import importlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.checkout import ROOT
from nanoslime.run_dir import RunDir
from tests.jobs.made_run import HOSTILE, make_run
from tests.tools.watch.watched import stand_in, write_phases
from tools.sweep import table

# A process without agents that commits when it is told to, and one that never does.
DRIVER = """
import sys, time
from pathlib import Path
from nanoslime.run_dir import RunDir
run = RunDir.open(Path(sys.argv[1]))
attempt = run.new_attempt()
run.write_status("generate", 3)
while sys.argv[2] == "deaf" or not attempt.must_stop():
    time.sleep(0.05)
run.write_status("checkpoint", 3)
run.write_status("stopped", 3)
"""


def start(run: RunDir, how: str, driver: str = DRIVER) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", driver, str(run.path), how], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not run.status():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    return process


@pytest.fixture
def submitted(tmp_path, programs) -> RunDir:
    """A run whose job 12 runs, in a directory with a name of all kinds of characters."""
    stand_in(programs, "squeue", "echo '12|RUNNING|None|1:00:00 left on n[1-2]'")
    run = make_run(tmp_path / HOSTILE, 2).run
    (run.path / "job.json").write_text('{"job_id": "12"}')
    run.new_attempt("12-0")
    return run


def test_attach_is_a_step_beside_the_running_one(submitted, told, monkeypatch):
    monkeypatch.setenv("SHELL", "/bin/zsh")
    step = ["srun", "--overlap", "--jobid=12", "--nodes=1", "--ntasks=1"]
    told_to = shlex.split(told("attach", submitted.path, "--print"))
    assert told_to == [*step, "--pty", "/bin/zsh"]
    on_node = shlex.split(told("attach", submitted.path, "--print", "--node", "n2"))
    assert on_node == [*step, "--nodelist=n2", "--pty", "/bin/zsh"]


def test_attach_takes_the_place_of_the_command(submitted, programs):
    calls = stand_in(programs, "srun", "exit 5")
    command = [sys.executable, "jobs/runs.py", "attach", str(submitted.path)]
    environ = os.environ | {"XDG_CACHE_HOME": str(programs / "cache")}
    assert subprocess.run(command, cwd=ROOT, env=environ).returncode == 5
    assert calls.read_text().startswith("--overlap --jobid=12")


@pytest.mark.parametrize(
    ("queue", "says"),
    [
        ("12|PENDING|Priority|4:00 left on ", "job 12 is PENDING"),
        ("", "job 12 is not in the queue any more"),
    ],
)
def test_a_run_without_an_allocation_cannot_be_attached_to(
    submitted, programs, refused, queue, says
):
    stand_in(programs, "squeue", f"echo '{queue}'")
    assert says in refused("attach", submitted.path)


def test_a_run_on_one_machine_has_no_allocation(tmp_path, refused):
    assert "it runs without SLURM" in refused("attach", make_run(tmp_path, 1).run.path)


def test_the_tunnel_can_be_pasted(submitted, told):
    assert "there is no" in told("tunnel", submitted.path)
    submitted.tensorboard.mkdir()
    comment, command, ray = told("tunnel", submitted.path).splitlines()
    assert comment.startswith("# ") and ray.startswith("# ")
    ssh, terminal, forward, ports, host, serve = shlex.split(command)
    assert (ssh, terminal, forward) == ("ssh", "-t", "-L")
    assert host.startswith(f"{getpass.getuser()}@")
    local, address, port = ports.split(":")
    assert (local, address) == ("6006", "127.0.0.1")
    python, *module, logs, served = shlex.split(serve)
    assert (python, *module) == (sys.executable, "-m", "tensorboard.main")
    assert (logs, served) == (f"--logdir={submitted.tensorboard}", f"--port={port}")


def test_stop_has_a_run_commit_and_waits_for_its_end(tmp_path, told):
    run = make_run(tmp_path, 1).run
    process = start(run, "obedient")
    asked, ended = told("stop", run.path).splitlines()
    assert asked == "attempt 1 commits and ends, for at most 600 s"
    reason = f"{getpass.getuser()} asked by runs.py stop"
    assert ended == f"attempt 1: stopped {reason}"
    assert process.wait(10) == 0
    attempt = run.attempt(1)
    assert attempt.must_stop() == attempt.final_stop() == reason


# One that commits as soon as all others are asked, too.
TOGETHER = DRIVER.replace(
    """run.write_status("checkpoint", 3)""",
    """attempts = [RunDir(path.parent).attempt(1) for path in run.path.parent.glob("*/status.json")]
while not all(other.must_stop() for other in attempts):
    time.sleep(0.05)
run.write_status("checkpoint", 3)""",
)


def test_all_runs_of_a_sweep_are_asked_before_one_is_waited_for(tmp_path, told):
    runs = [make_run(tmp_path, 1).run for _ in range(3)]
    rows = tuple(table.Row(index, "", index, run.name) for index, run in enumerate(runs))
    table.Table(tmp_path, "sweep.yaml", rows).write()
    processes = [start(run, "obedient", TOGETHER) for run in runs[1:]]
    shown = told("stop", tmp_path, "--wait", "20").splitlines()
    first, second, third = (run.name for run in runs)
    assert [process.wait(10) for process in processes] == [0, 0]
    reason = f"{getpass.getuser()} asked by runs.py stop"
    assert shown == [
        f"{first}: {runs[0].path} does not run: never started",
        f"{second}: attempt 1 commits and ends, for at most 20 s",
        f"{third}: attempt 1 commits and ends, for at most 20 s",
        f"{second}: attempt 1: stopped {reason}",
        f"{third}: attempt 1: stopped {reason}",
    ]


def test_a_process_that_does_not_end_in_time_gets_sigterm(tmp_path, told, refused):
    run = make_run(tmp_path, 1).run
    process = start(run, "deaf")
    text = told("stop", run.path, "--wait", "0.1")
    assert f"process {process.pid} has not ended in time and gets SIGTERM" in text
    assert process.wait(10) == -15
    assert "does not run: vanished" in refused("stop", run.path)


def test_a_job_is_cancelled_after_its_attempt_has_ended(submitted, programs, told):
    """SLURM may still take the job for running, or have requeued it."""
    phases = programs / "phases"
    phases.symlink_to(submitted.attempt(1).phases)
    calls = stand_in(programs, "scancel", f'tail -n 1 "{phases}" > "{programs}/when"')
    driver = DRIVER.replace("run.new_attempt()", "run.attempt(1)")
    process = start(submitted, "obedient", driver)
    asked, ended, cancelled = told("stop", submitted.path).splitlines()
    assert process.wait(10) == 0
    assert ended.startswith("attempt 1: stopped") and cancelled == "scancel 12: done"
    assert calls.read_text() == "12\n"
    assert json.loads((programs / "when").read_text())["phase"] == "stopped"


# A run that goes on in another job as soon as it is asked: the first attempt never says how it
# ended, the second one commits.
STARTED_ANEW = DRIVER.replace("run.new_attempt()", "run.attempt(1)").replace(
    """run.write_status("checkpoint", 3)""",
    """attempt = run.new_attempt("13-0")
(run.path / "job.json").write_text('{"job_id": "13"}')
run.write_status("generate", 2)
while not attempt.must_stop():
    time.sleep(0.05)""",
)


def test_an_attempt_that_begins_meanwhile_is_asked_too_and_its_job_cancelled(
    submitted, programs, told
):
    stand_in(programs, "squeue", 'for job in 12 13; do echo "$job|RUNNING|None|1:00 left"; done')
    calls = stand_in(programs, "scancel", "true")
    process = start(submitted, "obedient", STARTED_ANEW)
    first, second, ended, cancelled = told("stop", submitted.path, "--wait", "30").splitlines()
    assert process.wait(10) == 0
    assert first == "attempt 1 commits and ends, for at most 30 s"
    assert second.startswith("attempt 2 commits and ends, for at most ")
    assert ended.startswith("attempt 2: stopped") and cancelled == "scancel 13: done"
    assert submitted.attempt(2).final_stop() == f"{getpass.getuser()} asked by runs.py stop"
    assert calls.read_text() == "13\n"


def test_a_job_that_waits_is_cancelled_at_once(submitted, programs, told):
    stand_in(programs, "squeue", "echo '12|PENDING|BeginTime|4:00 left on '")
    calls = stand_in(programs, "scancel", "true")
    assert told("stop", submitted.path) == "scancel 12: done\n"
    assert calls.read_text() == "12\n"
    assert submitted.attempt(1).must_stop() is None


@pytest.mark.parametrize("ended", ["done", "failed"])
def test_what_has_ended_is_not_stopped(tmp_path, refused, ended):
    run = make_run(tmp_path, 1).run
    assert "does not run: never started" in refused("stop", run.path)
    write_phases(run, ("generate", 0, time.time()), (ended, 0, time.time()))
    assert f"does not run: {ended}" in refused("stop", run.path)


WANDB = """
import json, sys
print(json.dumps(sys.argv[1:]))
sys.exit(3 if "refused" in " ".join(sys.argv) else 0)
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch) -> None:
    """A stand-in for the wandb package, whose command prints its arguments."""
    package = tmp_path / "packages" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(WANDB)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=":")
    importlib.invalidate_caches()


def test_sync_uploads_the_folders_of_all_attempts_again_and_again(tmp_path, wandb):
    run = make_run(tmp_path, 1).run
    folders = [run.path / "wandb" / f"offline-run-2026112{day}_101010-abc" for day in (9, 8)]
    for folder in folders:
        folder.mkdir(parents=True)
    for _ in range(2):
        command = [sys.executable, "jobs/runs.py", "sync", str(run.path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        arguments, told = done.stdout.splitlines()
        wanted = ["sync", "--include-synced", *map(str, sorted(folders))]
        assert json.loads(arguments) == wanted and done.returncode == 0
        assert told == f"uploaded: 2 attempts of {run.path}"


def test_an_upload_that_fails_is_said(tmp_path, wandb, refused):
    run = make_run(tmp_path, 1).run
    (run.path / "wandb" / "offline-run-refused").mkdir(parents=True)
    assert "not all of" in refused("sync", run.path)


def test_sync_without_wandb_or_without_anything_to_upload_is_one_sentence(
    tmp_path, refused, monkeypatch
):
    run = make_run(tmp_path, 1).run
    assert "it ran without --use-wandb" in refused("sync", run.path)
    (run.path / "wandb" / "offline-run-1").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(ROOT)])
    assert "wandb is not installed in" in refused("sync", run.path)
    assert Path(sys.prefix).is_dir()
