"""A run that fails says so in its status, in one line to the user, and in full in its logs."""

import json
import logging
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from nanoslime import layout, rehearsal, train
from nanoslime.config import RunConfig
from nanoslime.config.deadlines import Deadline
from nanoslime.config.model import RehearsalConfig
from nanoslime.models.shape import ModelShape
from nanoslime.orchestration import checkpoints
from nanoslime.orchestration.ray import actors, cluster, trainers
from nanoslime.orchestration.report import Clock
from nanoslime.orchestration.rollout_manager import RolloutManager
from nanoslime.processes.temp import private_tmpdir
from nanoslime.run_dir import DONE, FAILED, RunDir
from nanoslime.training.fsdp import FSDPBackend
from nanoslime.types import RunError
from tests import process_table, strangers
from tests.full_disk import fill

SCORER = "nanoslime.rollout.rewards.scorer"
WATCHED = """
import sys, threading, time
from pathlib import Path
from nanoslime.config import RunConfig
from nanoslime.config.cluster import ClusterConfig
from nanoslime.orchestration import report
from nanoslime.run_dir import RunDir

def hang_here():
    time.sleep(600)

run = RunDir.create(Path(sys.argv[1]), "run")
run.write_config(RunConfig(cluster=ClusterConfig(hang_floor_s=1.0, hang_factor=2.0)))
attempt = run.new_attempt()
clock = report.Clock(run)
report._LOOK_S = 0.2
threading.Thread(target=report.watch, args=(attempt, clock), daemon=True).start()
for phase in ("generate", "train") * 4:
    clock(phase)
    time.sleep(0.01)
hang_here()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> rehearsal.RehearsalFiles:
    return rehearsal.make(tmp_path_factory.mktemp("files") / "model", RehearsalConfig())


def test_a_run_without_agents_that_hangs_ends_with_its_frame(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WATCHED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == FAILED, done.stderr
    run = RunDir.open(tmp_path / "run")
    status = run.status()
    assert status["phase"] == "failed" and status["can_go_on"]
    place = r"a hang: the driver on \S+ is in phase train for \d s, and may be for 1 s, at <string>"
    assert re.match(place, status["error"])
    assert "in hang_here" in (run.attempt(1).path / "stacks" / "node-0.txt").read_text()


def flags(root: Path, model: rehearsal.RehearsalFiles, *more: str) -> list[str]:
    given = ["--mock", "--run-root", root, "--name", "run", "--no-use-tensorboard"]
    given += ["--rehearsal.enabled=false", "--hf-checkpoint", model.model]
    given += ["--prompts", model.train, "--eval-prompts", "", "--num-rollout", "2"]
    given += ["--rollout-batch-size", "2", "--n-samples-per-prompt", "2", "--backend", "fsdp"]
    return [str(flag) for flag in (*given, *more)]


def failed(root: Path, caplog: pytest.LogCaptureFixture) -> tuple[str, str]:
    """The cause in the status, and the driver's log; the user saw the cause in one line.

    The traceback of a reward's own code is shown, once, where it failed.
    """
    run = RunDir.open(root / "run")
    status = run.status()
    assert status["phase"] == "failed"
    [line] = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    assert line == status["error"]
    assert "\n" not in line
    told_by_others = [r.getMessage() for r in caplog.records if r.name != SCORER]
    assert "Traceback" not in "".join(told_by_others)
    return line, run.attempt(1).log("driver", 0).read_text()


@pytest.mark.parametrize(
    ("reward", "line"),
    [
        ("missing_key", "KeyError: 'difficulty'"),
        ("exits", "SystemExit: the grader's server is gone"),
    ],
)
def test_a_failing_reward_is_named_and_its_traceback_kept(
    tmp_path, model, caplog, reward: str, line: str
) -> None:
    reward_flag = f"tests.orchestration.rewards:{reward}"
    assert train.main(flags(tmp_path, model, "--reward", reward_flag)) == FAILED
    told, log = failed(tmp_path, caplog)
    assert line in told
    assert told.startswith("rollout 0: 4 of 4 samples could not be made; first: prompt ")
    assert f": reward tests.orchestration.rewards:{reward}: " in told
    assert f"in {reward}\n" in log


@pytest.mark.parametrize("error", [MemoryError(), PermissionError(13, "denied", "/data"), 1])
def test_whatever_a_rank_raises_is_told_with_the_phase(
    tmp_path, model, caplog, monkeypatch, error
) -> None:
    """An in-process rank; 1 stands for a Ctrl-C."""
    cause = KeyboardInterrupt() if error == 1 else error

    def failing(*_: object) -> None:
        raise cause

    monkeypatch.setattr(FSDPBackend, "train_step", failing)
    monkeypatch.setattr(RolloutManager, "evaluate", lambda self, step: None)
    more = ["--algorithm.filter-zero-std=false"]
    assert train.main(flags(tmp_path, model, *more)) == FAILED
    told, log = failed(tmp_path, caplog)
    assert told.startswith(type(cause).__name__)
    assert "(in phase train after 0 rollouts; traceback in " in told
    assert "in failing\n" in log


def test_a_template_error_is_told(tmp_path, model, caplog) -> None:
    broken = tmp_path / "model"
    shutil.copytree(model.model, broken)
    config = json.loads((broken / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ raise_exception('roles must alternate') }}"
    (broken / "tokenizer_config.json").write_text(json.dumps(config))
    (broken / "chat_template.jinja").unlink(missing_ok=True)
    more = ["--hf-checkpoint", str(broken), "--chat-template", "on"]
    assert train.main(flags(tmp_path, model, *more)) == FAILED
    told, _ = failed(tmp_path, caplog)
    assert "roles must alternate" in told


@pytest.mark.parametrize("then", ["there is room", "it is told to stop"])
def test_a_run_whose_disk_is_full_keeps_its_last_commit_and_waits(
    small_disk, model, caplog, monkeypatch, then
) -> None:
    monkeypatch.setattr(checkpoints, "_RETRY_S", 2.0)
    fill(small_disk, leave_bytes=800_000)
    seen = []

    def follow() -> None:
        run = RunDir(small_disk / "run")
        process_table.wait_for(lambda: run.status().get("phase") == "wait for room", 120)
        seen.append((run.status()["step"], list(run.checkpoints.iterdir())))
        if then == "there is room":
            (small_disk / "ballast").unlink()
        else:
            run.attempt(1).request_stop("Ctrl-C")

    thread = threading.Thread(target=follow)
    thread.start()
    code = train.main(flags(small_disk, model, "--num-rollout", "1"))
    thread.join()
    run = RunDir.open(small_disk / "run")
    told = next(r.getMessage() for r in caplog.records if "waits for room" in r.getMessage())
    assert "keeps its commit after 0 rollouts" in told
    assert "No space left on device" in told and "delete what is not needed" in told
    assert seen == [(0, [])], "what was written is removed meanwhile"
    if then == "there is room":
        assert code == DONE
        assert run.num_committed() == 1
    else:
        assert code == FAILED
        assert "No space left on device" in run.status()["error"]


def test_a_phase_that_cannot_be_written_down_begins_all_the_same(small_disk, caplog) -> None:
    run = RunDir.create(small_disk, "run")
    run.new_attempt()
    clock = Clock(run)
    clock("generate")
    fill(small_disk)
    clock("train")
    assert clock.phase == "train"
    assert "the status of the run was not written: [Errno 28]" in caplog.text


@pytest.mark.ray
def test_a_rank_on_ray_that_raises_tells_its_log_and_the_driver(
    tmp_path, model, monkeypatch
) -> None:
    """TMPDIR is too long for Ray's sockets, which is mended first. Another Ray that somebody has
    started is not used."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "model").mkdir()
    shutil.copy(model.model / "config.json", tmp_path / "model")
    config = RunConfig(training={"backend": "fsdp", "num_gpus": 2}, cluster={"slots_per_node": 2})
    plan = layout.plan(config, ModelShape.read(tmp_path / "model"))
    attempt = RunDir.create(tmp_path, "run").new_attempt()
    before = psutil.Process().children(recursive=True)
    with private_tmpdir():
        cluster.start_local(plan.slots_per_node, plan.device, attempt.make_ray_token())
        try:
            of_ray = set(psutil.Process().children(recursive=True)) - set(before)
            answers = strangers.knock(strangers.listeners(of_ray))
            # Ray's monitor tells everybody its counts for Prometheus, and takes no order.
            told = {answer for one, answer in answers if "/ray/autoscaler/" not in one.process}
            assert len(answers) >= 3 and told <= strangers.REFUSED
            places = [actors.ActorPlace(index=0, node=0, num_slots=0)]
            nowhere = replace(attempt, number=2)
            run = actors.RunOnRay(config, nowhere, tmp_path / "model")
            doomed = actors.Actors(trainers.RankActor, "doomed rank", "doomed", places, run)
            refs = doomed.start_on_each("place")
            with pytest.raises(
                RunError, match="doomed rank 0 on node 0 failed to start: FileNotFound"
            ):
                doomed.gather(refs, "start", Deadline(60.0, "training.start_deadline_s"))
            group = trainers.RayTrainGroup(replace(run, attempt=attempt), plan)
            with pytest.raises(RunError) as caught:
                group.setup()
        finally:
            cluster.disconnect()
    assert "failed to load the model: " in str(caught.value)
    assert "\n" not in str(caught.value)
    logs = [attempt.log("trainer", rank).read_text() for rank in range(2)]
    assert any("Traceback (most recent call last)" in log for log in logs)
