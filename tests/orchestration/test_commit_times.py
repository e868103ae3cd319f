"""When checkpoints are due, by steps and by a clock, and which attempt may commit them."""

from pathlib import Path

import pytest

from nanoslime.config.load import load
from nanoslime.orchestration.checkpoints import Checkpoints
from nanoslime.run_dir import RunDir
from nanoslime.storage.commit import checkpoints as committed
from nanoslime.types import RunError


class Clock:
    minutes = 0.0

    def __call__(self) -> float:
        return 1000.0 + 60 * self.minutes


class Trainer:
    def save(self, path) -> dict[str, str]:
        (path / "weights").write_text("w")
        return {}


class Rollout:
    def save(self, path) -> dict:
        return {}


class Weights:
    version = 0

    def look_at_probe(self) -> dict:
        return {}


@pytest.fixture
def made(tmp_path):
    def make(*flags: str, job: str = "") -> tuple[Checkpoints, Clock]:
        clock = Clock()
        config = load(None, None, ["--num-rollout", "100", *flags])
        attempt = RunDir.create(tmp_path, "run").new_attempt(job)
        return Checkpoints(config, attempt, Trainer(), Rollout(), Weights(), clock=clock), clock

    return make


def test_a_checkpoint_is_due_when_so_many_minutes_have_passed_since_the_last(made):
    checkpoints, clock = made("--checkpoint.every-min", "30")
    assert not checkpoints.due(0)
    clock.minutes = 29.9
    assert not checkpoints.due(1)
    clock.minutes = 30
    assert checkpoints.due(2)
    checkpoints.commit(3, None)
    assert not checkpoints.due(3)
    clock.minutes = 59.9
    assert not checkpoints.due(4)
    clock.minutes = 75
    assert checkpoints.due(5)
    assert checkpoints.due(99), "the last one always is"


def test_a_commit_by_the_interval_starts_the_minutes_anew(made):
    checkpoints, clock = made("--checkpoint.every-min", "30", "--save-interval", "4")
    clock.minutes = 20
    assert [step for step in range(8) if checkpoints.due(step)] == [3, 7]
    checkpoints.commit(4, None)
    clock.minutes = 40
    assert not checkpoints.due(4)
    clock.minutes = 50
    assert checkpoints.due(4)


def test_without_minutes_only_steps_count(made):
    checkpoints, clock = made()
    clock.minutes = 10_000
    assert not checkpoints.due(5)


def test_each_step_of_a_job_is_committed_where_training_would_outlast_a_stop(made):
    checkpoints, _ = made("--cluster.signal-lead-s", "100", job="42-0")
    assert not checkpoints.due(5, train_s=79.0)
    assert checkpoints.due(6, train_s=81.0)
    assert not checkpoints.due(7, train_s=79.0)
    # Nobody ends a run of this machine by a clock.
    alone, _ = made("--cluster.signal-lead-s", "100")
    assert not alone.due(6, train_s=81.0)


@pytest.mark.parametrize("begins", ["before", "while the trainer saves"])
def test_an_attempt_that_a_newer_one_has_followed_commits_nothing(made, monkeypatch, begins):
    checkpoints, _ = made()
    run = checkpoints.run
    checkpoints.commit(1, None)
    save = Trainer.save

    def meanwhile(trainer: Trainer, path: Path) -> dict[str, str]:
        run.new_attempt()
        return save(trainer, path)

    if begins == "before":
        run.new_attempt()
    else:
        monkeypatch.setattr(Trainer, "save", meanwhile)
    with pytest.raises(RunError, match="attempt 2 of .* has begun, so attempt 1 ends"):
        checkpoints.commit(2, None)
    assert [step for step, _ in committed(run.checkpoints)] == [1]
