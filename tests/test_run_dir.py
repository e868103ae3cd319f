"""The run directory: unique, private, and one truth about attempts, stops, ends and status."""

import errno
import grp
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from nanoslime import run_dir
from nanoslime.config import RunConfig
from nanoslime.config.load import read
from nanoslime.run_dir import DONE, FAILED, RunDir
from nanoslime.storage.shared_files import read_json
from nanoslime.types import RunError
from tests.full_disk import fill
from tools.provenance import write_provenance


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path / 'it\'s a "root"; echo', "run")


def test_a_new_run_never_shares_a_directory(tmp_path: Path) -> None:
    runs = [RunDir.create(tmp_path, "run") for _ in range(3)]
    assert len({run.path for run in runs}) == 3
    assert runs[0].name == "run"
    assert all(run.name.startswith("run-") for run in runs[1:])
    assert all(run.path.stat().st_mode & 0o777 == 0o700 for run in runs)


@pytest.fixture
def kept_umask() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


def test_a_group_may_read_a_shared_run_and_not_its_secrets(kept_umask, tmp_path: Path) -> None:
    """So it is with what another process makes that opens the run, whatever its umask."""
    group = os.getgroups()[-1] if os.getgroups() else os.getgid()
    run = RunDir.create(tmp_path, "run", grp.getgrgid(group).gr_name)
    assert run.path.stat().st_mode & 0o7777 == 0o2750
    os.umask(0o077)
    run = RunDir.open(run.path)
    attempt = run.new_attempt()
    attempt.make_ray_token()
    attempt.beat(0, 1)
    for path in run.path.rglob("*"):
        found = path.lstat()
        if path.is_symlink():
            continue
        assert found.st_gid == group
        secret = path.name == "ray_token"
        assert (found.st_mode & 0o077 == 0) if secret else (found.st_mode & 0o047 == 0o040), path


def test_a_run_of_one_user_leaves_the_umask(kept_umask, run: RunDir) -> None:
    RunDir.open(run.path)
    assert os.umask(0o077) == 0o077


def test_a_run_is_not_shared_with_a_group_that_there_is_not(kept_umask, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cluster.share='no such group': .*`id -Gn`"):
        RunDir.create(tmp_path, "run", "no such group")
    assert list(tmp_path.iterdir()) == []


def test_open_refuses_what_is_no_run(run: RunDir, tmp_path: Path) -> None:
    assert RunDir.open(run.path) == run
    with pytest.raises(RunError, match="not a run directory"):
        RunDir.open(tmp_path)


def test_paths_are_those_of_the_design(run: RunDir) -> None:
    attempt = run.new_attempt()
    expected = {
        "config.yaml": run.config,
        "config.accepted.yaml": run.accepted_config,
        "plan.json": run.plan,
        "checkpoints/step_3": run.checkpoint(3),
        "hf/step_3": run.hf(3),
        "attempts/1/logs/trainer-1.log": attempt.log("trainer", 1),
        "metrics.jsonl": run.metrics,
    }
    for name, path in expected.items():
        assert path == run.path / name


def test_attempts_count_up_and_latest_follows(run: RunDir) -> None:
    assert run.latest_attempt() is None
    first = run.new_attempt("7-0")
    second = run.new_attempt("7-1")
    assert (first.number, second.number) == (1, 2)
    assert os.readlink(run.attempts / "latest") == "2"
    assert run.latest_attempt() == second
    assert run.find_attempt("7-0") == first
    assert run.find_attempt("8-0") is None
    with pytest.raises(RunError, match=r"no attempt 3; it has \[1, 2\]"):
        run.attempt(3)


def test_attempts_made_at_once_are_different(run: RunDir) -> None:
    numbers: list[int] = []

    def make_attempt() -> None:
        numbers.append(run.new_attempt().number)

    threads = [threading.Thread(target=make_attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 9))


def test_a_stop_belongs_to_one_attempt(run: RunDir) -> None:
    first = run.new_attempt()
    assert first.must_stop() is None
    first.request_stop("time limit", requeue=True)
    first.request_stop("second thoughts", requeue=True)
    assert (first.must_stop(), first.final_stop()) == ("time limit", None)
    first.request_stop("cancelled")
    first.request_stop("SIGUSR2", requeue=True)
    assert (first.must_stop(), first.final_stop()) == ("time limit", "cancelled")
    assert run.new_attempt().must_stop() is None


def test_an_attempt_is_over_when_a_newer_one_has_begun(run: RunDir) -> None:
    first = run.new_attempt("7-0")
    first.require_newest()
    second = run.new_attempt("7-1")
    says = f"attempt 2 of {re.escape(str(run.path))} has begun, so attempt 1 ends"
    for heard in (first.must_stop, first.require_newest):
        with pytest.raises(RunError, match=says) as error:
            heard()
        assert "\n" not in str(error.value)
    assert second.must_stop() is None


def test_a_run_whose_process_lives_on_this_host_is_not_started_again(
    run: RunDir, tmp_path: Path
) -> None:
    make = "import sys, time; from nanoslime.run_dir import RunDir; from pathlib import Path\n"
    make += "RunDir.open(Path(sys.argv[1])).new_attempt(); print(); time.sleep(60)"
    maker = subprocess.Popen(
        [sys.executable, "-c", make, run.path], stdout=subprocess.PIPE, text=True
    )
    assert maker.stdout is not None
    maker.stdout.readline()
    with pytest.raises(RunError, match=f"process {maker.pid} on this host drives its attempt 1"):
        run.refuse_if_alive()
    run.attempt(1).beat(1, 3)
    maker.kill()
    maker.wait()
    maker.stdout.close()
    run.refuse_if_alive()


def test_the_first_end_stays(run: RunDir) -> None:
    attempt = run.new_attempt()
    assert attempt.ended() is None
    attempt.end(FAILED, "trainer-1 died")
    attempt.end(DONE, "")
    assert attempt.ended() == (FAILED, "trainer-1 died")


def test_of_ends_published_at_once_one_stays_and_says_so(run: RunDir) -> None:
    attempt = run.new_attempt()
    together = threading.Barrier(8)
    told: dict[int, bool] = {}

    def end(code: int) -> None:
        together.wait()
        told[code] = attempt.end(code, f"agent {code}")

    threads = [threading.Thread(target=end, args=(code,)) for code in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [winner] = [code for code, won in told.items() if won]
    assert attempt.ended() == (winner, f"agent {winner}")
    assert not list(attempt.path.glob(".end*"))


def test_one_request_to_end_takes_back_what_others_asked(run: RunDir) -> None:
    attempt = run.new_attempt()
    together = threading.Barrier(8)

    def ask(node: int) -> None:
        together.wait()
        attempt.request_stop(f"node {node}", requeue=node != 3)

    threads = [threading.Thread(target=ask, args=(node,)) for node in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert attempt.final_stop() == "node 3"
    assert attempt.must_stop()


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ENOENT])
def test_a_heartbeat_that_cannot_be_read_is_missing_this_time(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A fault of a file server is injected at the read of one file."""
    attempt = run.new_attempt()
    attempt.beat(0, 4)
    attempt.beat(1, 5)
    attempt.end(FAILED, "over")
    bad = {attempt.path / "heartbeat" / "1.json", attempt.path / "end.json"}
    read_bytes = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path in bad:
            raise OSError(number, os.strerror(number), str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    assert attempt.heartbeats().keys() == {"0"}
    assert attempt.heartbeats([0, 1, 2]).keys() == {"0"}
    assert attempt.ended() is None
    bad.clear()
    assert attempt.heartbeats().keys() == {"0", "1"}
    assert attempt.ended() == (FAILED, "over")


@pytest.mark.parametrize("phase", ["done", "stopped", "failed"])
@pytest.mark.parametrize("first", ["status", "end", "left"])
def test_how_an_attempt_ended_can_be_said_on_a_full_disk(
    small_disk: Path, first: str, phase: str
) -> None:
    run = RunDir.create(small_disk, "run")
    attempt = run.new_attempt()
    run.write_status("generate", 3)
    attempt.beat(0, 1)
    fill(small_disk)
    with pytest.raises(OSError, match="No space"):
        attempt.beat(0, 2)
    says = {
        "status": lambda: run.write_status(phase, 3),
        "end": lambda: attempt.end(FAILED, "no space"),
        "left": lambda: attempt.leave(0),
    }
    says.pop(first)()
    for say in says.values():
        say()
    assert run.status()["phase"] == phase
    assert attempt.ended() == (FAILED, "no space")
    assert "left" in attempt.heartbeats()["0"]


def test_status_holds_phase_step_and_every_nodes_heartbeat(run: RunDir) -> None:
    assert run.status() == {}
    attempt = run.new_attempt()
    attempt.beat(0, 4)
    attempt.beat(3, 9)
    attempt.beat(2, 1)
    attempt.leave(2)
    run.write_status("train", 2, reward=0.5)
    status = run.status()
    assert status["phase"] == "train"
    assert status["step"] == 2
    assert status["attempt"] == 1
    assert status["reward"] == 0.5
    beats = status["heartbeat"]
    assert {node: beat.get("count", "left") for node, beat in beats.items()} == {
        "0": 4,
        "2": "left",
        "3": 9,
    }


def test_provenance_names_commit_and_versions(run: RunDir) -> None:
    write_provenance(run, ["submit_grpo.py", "--nodes", "4"])
    text = run.provenance.read_text()
    assert '"--nodes"' in text
    assert '"ray": "2.' in text


def test_every_attempt_keeps_its_phases(run: RunDir) -> None:
    first = run.new_attempt()
    run.write_status("generate", 3)
    run.write_status("failed", 3, error="no")
    second = run.new_attempt()
    run.write_status("train", 3)
    kept = [json.loads(line) for line in first.phases.read_text().splitlines()]
    assert [(line["phase"], line["step"], line.get("error")) for line in kept] == [
        ("generate", 3, None),
        ("failed", 3, "no"),
    ]
    assert kept[0]["time"] <= kept[1]["time"] <= time.time()
    assert [json.loads(line)["phase"] for line in second.phases.open()] == ["train"]


def test_only_the_last_status_of_a_run_waits_for_the_disk(run: RunDir, monkeypatch) -> None:
    run.new_attempt()
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    run.write_status("train", 3)
    assert not synced
    run.write_status("failed", 3, error="why")
    assert len(synced) == 1
    assert (run.status()["phase"], run.status()["error"]) == ("failed", "why")


def test_a_status_that_a_loss_of_power_has_emptied_is_none(run: RunDir, monkeypatch) -> None:
    monkeypatch.setattr(run_dir, "read_json", partial(read_json, deadline_s=0.1))
    run.new_attempt()
    run.write_status("train", 3)
    (run.path / "status.json").write_bytes(b"")
    assert run.status() == {}
    run.write_status("generate", 4)
    assert run.status()["step"] == 4


def test_a_run_goes_on_with_the_configuration_that_a_driver_has_taken(run: RunDir) -> None:
    for seed in (1, 2, 3):
        run.write_config(RunConfig(seed=seed))
    assert (read(run.config).seed, read(run.config_to_resume()).seed) == (3, 1)
    run.accepted_config.unlink()
    assert read(run.config_to_resume()).seed == 3
