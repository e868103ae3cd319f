"""The deadlines of the trainer ranks, as the plan derives them."""

from dataclasses import replace

import pytest

from nanoslime.config import RolloutConfig, RunConfig, TrainingConfig
from nanoslime.config.cluster import ClusterConfig
from nanoslime.config.deadlines import derive_deadlines
from nanoslime.config.load import load
from nanoslime.types import RunError

LONG = RunConfig(
    rollout=RolloutConfig(rollout_batch_size=128, n_samples_per_prompt=16, max_new_tokens=31_744),
    cluster=ClusterConfig(gpus_per_node=8),
)


def test_a_small_run_has_half_an_hour_beyond_a_collective():
    deadlines = derive_deadlines(RunConfig(), 100_000, 4)
    assert deadlines.train.seconds == deadlines.save.seconds == 600 + 1800
    longer = RunConfig(training=TrainingConfig(collective_deadline_s=5000))
    assert derive_deadlines(longer, 100_000, 4).train.seconds == 5000 + 1800


def test_they_grow_with_the_work_and_shrink_with_the_ranks():
    few, many = (derive_deadlines(LONG, 8_000_000_000, ranks) for ranks in (8, 64))
    # 2,048 samples of 32,768 tokens, 5 passes of 2 operations a parameter, at 1e13 a rank.
    assert few.train.seconds == pytest.approx(600 + 2048 * 32_768 * 10 * 8e9 / 8e13)
    assert many.train.seconds == pytest.approx(600 + 2048 * 32_768 * 10 * 8e9 / 64e13)
    # 128 GB at 20 MB/s a rank are less than half an hour.
    assert few.save.seconds == 600 + 1800
    assert derive_deadlines(LONG, 80_000_000_000, 8).save.seconds == 600 + 16 * 80e9 / 160e6


def test_what_is_set_holds_and_errors_name_the_setting():
    training = TrainingConfig(train_deadline_s=700, save_deadline_s=800)
    deadlines = derive_deadlines(replace(LONG, training=training), 8_000_000_000, 8)
    assert str(deadlines.train) == "training.train_deadline_s=700"
    assert str(deadlines.save) == "training.save_deadline_s=800"
    assert str(deadlines.start) == "training.start_deadline_s=600"


@pytest.mark.parametrize("field", ["train_deadline_s", "save_deadline_s"])
def test_a_collective_ends_before_what_it_is_part_of(field):
    flags = [f"--training.{field.replace('_', '-')}", "600"]
    message = f"training.{field}=600 must be above training.collective_deadline_s=600"
    with pytest.raises(RunError, match=message):
        load(None, None, flags)
    load(None, None, [*flags, "--training.collective-deadline-s", "599"])
