"""Where metrics arrive, what a resumed run does to them, what a missing writer says."""

import importlib
import json
import logging
import math
import sys
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nanoslime import tracking
from nanoslime.config.rollout import RolloutConfig
from nanoslime.config.run import RunConfig
from nanoslime.config.training import TrackingConfig
from nanoslime.run_dir import RunDir
from nanoslime.tracking import console_line, make_tracker

METRICS = {
    "rollout/reward_mean": 0.41237,
    "train/ppo_kl_abs": 0.00123,
    "train/logprob_gap_mean": 2e-6,
    "train/logprob_gap_max": 3e-5,
    "time/generate_s": 1.26,
    "time/weight_sync_s": 0.04,
}


WANDB_STAND_IN = """
import threading

calls = []
never = threading.Event()
hangs_in = ""

def hang(where):
    if where == hangs_in:
        never.wait()

class Run:
    def log(self, metrics, step):
        hang("log")
        if "refused" in metrics:
            raise ValueError("not this one")
        calls.append([step, metrics])

    def finish(self):
        hang("finish")
        calls.append("finish")

def init(**options):
    hang("init")
    if options["project"] == "refused":
        raise PermissionError("no such project")
    calls.append(options)
    return Run()
"""


@pytest.fixture
def run(tmp_path):
    return RunDir.create(tmp_path, "a'; echo foo")


def config(**tracking):
    return RunConfig(rollout=RolloutConfig(num_rollout=9), tracking=TrackingConfig(**tracking))


def rows(run):
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def test_console_line_by_hand():
    line = "step 3/9  reward 0.412  ppo_kl_abs 1.2e-03  gap 2.0e-06  gap_max 3.0e-05"
    assert console_line(2, 9, METRICS) == line + "  generate 1.3s"
    # Workers sum the first over what runs beside one another; the second is a part of weight_sync.
    no_phases = {"time/score_s": 18.9, "time/weight_sync_pause_s": 0.2}
    assert console_line(2, 9, METRICS | no_phases) == console_line(2, 9, METRICS)
    with_reference = METRICS | {"train/ref_kl": 0.5, "eval/reward_mean": 0.7, "train/skipped": 1.0}
    line = console_line(2, 9, with_reference)
    assert "ref_kl 5.0e-01" in line and "ppo_kl" not in line
    assert "eval 0.700" in line and "SKIPPED" in line
    assert console_line(0, 9, {}) == "step 1/9"


def test_each_step_is_in_the_file_and_on_the_console_when_log_returns(run, caplog):
    caplog.set_level(logging.INFO, "nanoslime")
    with make_tracker(config(use_tensorboard=False), run, 0) as tracker:
        tracker.log(0, METRICS)
        assert rows(run) == [{"step": 0, **METRICS}]
        tracker.log(1, {"a": 1.0})
        assert rows(run)[1] == {"step": 1, "a": 1.0}
    assert [r.getMessage().split("  ")[0] for r in caplog.records] == ["step 1/9", "step 2/9"]
    assert not run.tensorboard.exists()


def test_what_is_no_number_is_null_in_json(run):
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    with make_tracker(config(use_tensorboard=False), run, 0) as tracker:
        tracker.log(0, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5})
    (line,) = run.metrics.read_text().splitlines()
    numbers = json.loads(line, parse_constant=refuse)
    assert numbers == {"step": 0, "a": None, "b": None, "c": None, "d": 1.5}


def test_a_resumed_run_supersedes_later_steps_and_a_cut_line(run):
    with make_tracker(config(use_tensorboard=False), run, 0) as tracker:
        for step in range(4):
            tracker.log(step, {"a": float(step)})
    with open(run.metrics, "a") as file:
        file.write('{"step": 4, "a"')
    with make_tracker(config(use_tensorboard=False), run, 2) as tracker:
        tracker.log(2, {"a": 20.0})
    assert rows(run) == [{"step": 0, "a": 0.0}, {"step": 1, "a": 1.0}, {"step": 2, "a": 20.0}]


@pytest.mark.parametrize(("start", "logged"), [(0, []), (3, ["resuming after step 3/9"])])
def test_a_resumed_run_says_after_which_step(run, caplog, start, logged):
    caplog.set_level(logging.INFO, "nanoslime")
    with make_tracker(config(use_tensorboard=False), run, start):
        assert [r.getMessage() for r in caplog.records] == logged


@pytest.mark.parametrize(("start", "left"), [(0, []), (1, [-1, 0]), (2, [-1, 0, 1])])
def test_a_resumed_run_supersedes_later_evaluations_and_a_cut_line(run, start, left):
    lines = [json.dumps({"step": step, "reward": 0.5}) + "\n" for step in (-1, 0, 1, 2)]
    run.evals.write_text("".join(lines) + '{"step": 3, "rew')
    with make_tracker(config(use_tensorboard=False), run, start):
        kept = [json.loads(line)["step"] for line in run.evals.read_text().splitlines()]
    assert kept == left


def test_tensorboard_reads_it_and_resumed_steps_replace(run):
    for start, offset in ((0, 0.0), (2, 100.0)):
        with make_tracker(config(), run, start) as tracker:
            for step in range(start, start + 3):
                tracker.log(step, {"rollout/reward_mean": step + offset})
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    values = {e.step: e.value for e in events.Scalars("rollout/reward_mean")}
    assert values == {0: 0.0, 1: 1.0, 2: 102.0, 3: 103.0, 4: 104.0}
    assert len(events.Scalars("rollout/reward_mean")) == 5


def test_wandb_asked_for_but_not_installed_is_a_clear_error(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="tracking.use_wandb=true.*cannot load wandb"):
        make_tracker(config(use_wandb=True), run, 0)


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """A stand-in for the wandb package, which keeps its calls and hangs where it is told to."""
    (tmp_path / "wandb.py").write_text(WANDB_STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield importlib.import_module("wandb")
    sys.modules.pop("wandb").never.set()


@pytest.mark.parametrize(
    ("asked", "mode", "project"),
    [
        ({}, "offline", "nanoslime"),
        ({"wandb_mode": "online", "wandb_project": "mine"}, "online", "mine"),
    ],
)
def test_wandb_gets_steps_offline_by_default(run, wandb, asked, mode, project):
    with make_tracker(config(use_wandb=True, use_tensorboard=False, **asked), run, 0) as tracker:
        tracker.log(0, {"a": 1.0})
    options, *calls = wandb.calls
    assert (options["mode"], options["project"]) == (mode, project)
    assert options["name"] == run.name
    assert options["dir"] == str(run.path)
    assert options["config"]["rollout"]["num_rollout"] == 9
    assert calls == [[0, {"a": 1.0}], "finish"]


def test_all_attempts_of_a_run_are_one_wandb_run(run, wandb, tmp_path):
    another = RunDir.create(tmp_path / "elsewhere", run.name)
    for each, start in ((run, 0), (run, 1), (another, 0)):
        with make_tracker(config(use_wandb=True, use_tensorboard=False), each, start):
            pass
    first, again, other = [call["id"] for call in wandb.calls if call != "finish"]
    assert first == again != other


@pytest.mark.parametrize("hangs_in", ["init", "log", "finish"])
def test_a_tracker_that_hangs_costs_its_own_steps_alone(run, wandb, monkeypatch, caplog, hangs_in):
    monkeypatch.setattr(tracking, "_MAX_WAITING", 2)
    monkeypatch.setattr(tracking, "_OPEN_DEADLINE_S", 0.1)
    monkeypatch.setattr(tracking, "_CLOSE_DEADLINE_S", 0.1)
    wandb.hangs_in = hangs_in
    begin = time.monotonic()
    with make_tracker(config(use_wandb=True, use_tensorboard=False), run, 0) as tracker:
        for step in range(9):
            tracker.log(step, {"a": 1.0})
    assert time.monotonic() - begin < 5.0
    assert [row["step"] for row in rows(run)] == list(range(9))
    told = [record.getMessage() for record in caplog.records]
    assert any("W&B has not ended within 0.1 s" in line for line in told)
    if hangs_in != "finish":
        # One step is in its hands, unless it has not even begun, and two wait for it.
        num_dropped = 9 - 2 - (hangs_in == "log")
        assert tracker.writers[0].num_dropped in (num_dropped, num_dropped + 1)
        assert rows(run)[-1]["tracking/dropped"] >= num_dropped - 1
        assert sum("W&B has lost step" in line for line in told) == 1


def test_a_tracker_that_refuses_a_step_gets_the_next_one(run, wandb):
    with make_tracker(config(use_wandb=True, use_tensorboard=False), run, 0) as tracker:
        tracker.log(0, {"refused": 1.0})
        tracker.log(1, {"a": 1.0})
    assert wandb.calls[1:] == [[1, {"a": 1.0}], "finish"] or wandb.calls[1][1]["a"] == 1.0
    assert tracker.writers[0].num_dropped == 1


def test_a_tracker_that_cannot_begin_ends_the_start(run, wandb):
    with pytest.raises(PermissionError, match="no such project"):
        make_tracker(config(use_wandb=True, wandb_project="refused"), run, 0)
