"""The batches of a rollout whose samples are all in this process."""

from collections.abc import Sequence

from nanoslime.batch import TrainBatch
from nanoslime.training.batching import BatchingOptions, fill, plan_train_batches
from nanoslime.types import SampleGroup, local_reports


def make_train_batches(
    groups: Sequence[SampleGroup], options: BatchingOptions
) -> list[list[TrainBatch]]:
    """[optimizer step][data-parallel rank]: batches that hold each sample once."""
    steps = plan_train_batches(local_reports(groups), options)
    return [[fill(plan) for plan in step] for step in steps]
