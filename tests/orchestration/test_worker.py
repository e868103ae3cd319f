"""What a trainer rank makes of all batches of a rollout before its first optimizer step."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nanoslime import algorithms
from nanoslime.batch import StepMetrics
from nanoslime.config import ModelConfig, RolloutConfig, RunConfig, TrainingConfig
from nanoslime.config.algorithm import GRPOConfig, ReinforcePPConfig
from nanoslime.orchestration.worker import TrainWorker, metrics_row
from nanoslime.rollout import recorder
from nanoslime.rollout.tasks import Sampling
from nanoslime.run_dir import RunDir
from nanoslime.storage.token_gaps import gaps_file, tokens_key
from nanoslime.training.batching import BatchingOptions
from tests.algorithms.made import group
from tests.models.hf import save_model
from tests.training.batches import make_train_batches
from tests.training.rank_pool import RankPool
from tools.watch.recorded import read_samples

CONFIG = RunConfig(
    model=ModelConfig(dtype="float32"),
    rollout=RolloutConfig(rollout_batch_size=2),
    algorithm=ReinforcePPConfig(),
    training=TrainingConfig(backend="fsdp", num_steps_per_rollout=2),
)
SAMPLING = Sampling(2, 8, 1.0)


def train(env, model_dir, steps):
    """This rank's token advantages in the loss, step by step, and the gradient norms' mean."""
    worker = TrainWorker(CONFIG, model_dir, env)
    batches = [step[worker.dp_rank] for step in steps]
    row = worker.train(batches)
    values = [
        torch.cat([x[mask] for x, mask in zip(b.token_advantages, b.loss_mask, strict=True)])
        for b in batches
    ]
    return values, row["train/grad_norm"]


def test_advantages_are_whitened_over_the_rollout_not_its_steps(tmp_path):
    """Every reward of the first step is 1, of the second 0: on its own neither has
    anything to learn from.
    """
    groups = [group(0, [1.0, 1.0]), group(1, [0.0, 0.0])]
    algorithms.make(CONFIG.algorithm, 2).advantages(groups)
    options = BatchingOptions(
        num_steps=2, dp_size=2, max_tokens=64, denominator="tokens", temperature=1.0
    )
    steps = make_train_batches(groups, options)
    ranks = RankPool(2)
    try:
        found = ranks(train, save_model(tmp_path, "qwen3"), steps)
    finally:
        ranks.close()
    one = 0.5 / (8 / 4 / 7) ** 0.5  # of 8 tokens, half are 1 and half are 0
    for (first, second), norm in found:
        assert first.tolist() == pytest.approx([one] * 2)
        assert second.tolist() == pytest.approx([-one] * 2)
        assert norm > 0


def count_exchanges(env, model_dir, steps):
    """How often the reference's weights were copied to the model; the logprobs by batch."""
    algorithm = GRPOConfig(use_kl_loss=True, kl_loss_coef=0.1, old_logprobs="recomputed")
    worker = TrainWorker(replace(CONFIG, algorithm=algorithm), model_dir, env)
    batches = [step[0] for step in steps]
    expected = [worker.backend.logprobs(batch, "ref") for batch in batches]
    num_copied = 0
    foreach_copy = torch._foreach_copy_

    def counting(destination, source, **options):
        nonlocal num_copied
        num_copied += source is worker.backend._reference
        return foreach_copy(destination, source, **options)

    torch._foreach_copy_ = counting
    try:
        worker.train(batches)
    finally:
        torch._foreach_copy_ = foreach_copy
    same = [
        torch.cat(batch.ref_logprobs).equal(torch.cat(of_batch))
        for batch, of_batch in zip(batches, expected, strict=True)
    ]
    return num_copied, same


def test_the_reference_takes_the_policys_place_once_a_rollout(tmp_path, one_rank):
    groups = [group(0, [1.0, 0.0]), group(1, [1.0, 0.0])]
    algorithms.make(CONFIG.algorithm, 2).advantages(groups)
    options = BatchingOptions(
        num_steps=2, dp_size=1, max_tokens=4, denominator="tokens", temperature=1.0
    )
    steps = make_train_batches(groups, options)
    assert [len(step[0].microbatches) for step in steps] == [2, 2]
    [(num_copied, same)] = one_rank(count_exchanges, save_model(tmp_path, "qwen3"), steps)
    assert num_copied == 1
    assert same == [True, True]


def test_a_row_has_the_means_of_means_and_the_maxima_of_maxima():
    steps = [
        StepMetrics(
            loss=loss,
            grad_norm=1.0,
            lr=0.5,
            skipped=skipped,
            means={"train/a": mean},
            maxima={"train/b": maximum},
            minima={"train/c": maximum},
            num_skipped=num_skipped,
        )
        for loss, skipped, mean, maximum, num_skipped in [
            (1.0, False, 2.0, 5.0, 3),
            (2.0, True, 4.0, -1.0, 4),
        ]
    ]
    assert metrics_row(steps) == {
        "train/loss": 1.5,
        "train/grad_norm": 1.0,
        "train/lr": 0.5,
        "train/skipped": 0.5,
        "train/a": 3.0,
        "train/b": 5.0,
        "train/c": -1.0,
        "train/num_skipped": 4.0,
    }


class NoEngine:
    """A sender to nobody."""

    def prepare(self, version: int) -> None: ...

    def close(self) -> None: ...


def note_gaps(env, config, model_dir, run, steps):
    """Trains on rollout 4 in this run; returns the logprobs of its sequences by their tokens."""
    worker = TrainWorker(config, model_dir, env, run)
    batches = [step[worker.dp_rank] for step in steps]
    found = {}
    for batch in batches:
        logprobs = worker.backend.logprobs(batch, "policy")
        for ids, values in zip(batch.token_ids, logprobs or [], strict=False):
            found[tokens_key(ids.numpy())] = values.tolist()
    worker._sender = NoEngine()
    worker.prepare(4)
    worker.train(batches)
    return found


@pytest.mark.parametrize("old_logprobs", ["recomputed", "current"])
@pytest.mark.parametrize(
    "training",
    [
        {"backend": "fsdp"},
        pytest.param({"backend": "megatron", "tp_size": 2}, marks=pytest.mark.megatron),
        pytest.param({"backend": "megatron", "pp_size": 2}, marks=pytest.mark.megatron),
    ],
    ids=str,
)
def test_the_gap_of_each_token_to_the_engine_is_kept(tmp_path, training, old_logprobs):
    config = RunConfig(
        model=ModelConfig(dtype="float32"),
        rollout=RolloutConfig(rollout_batch_size=2, record_keep=2),
        algorithm=GRPOConfig(old_logprobs=old_logprobs),
        training=TrainingConfig(**training),
    )
    run = RunDir.create(tmp_path, "run")
    gaps_file(run.rollouts, 2, 0).touch()
    gaps_file(run.rollouts, 3, 0).touch()
    groups = [group(0, [1.0, 0.0], lengths=[3, 5]), group(1, [0.0, 1.0], lengths=[2, 7])]
    for sample in (sample for one in groups for sample in one.samples):
        sample.rollout_logprobs[1:] = -0.5
    algorithms.make(config.algorithm, 2).advantages(groups)
    dp_size = 2 if training["backend"] == "fsdp" else 1
    options = BatchingOptions(
        num_steps=1, dp_size=dp_size, max_tokens=64, denominator="tokens", temperature=1.0
    )
    steps = make_train_batches(groups, options)
    ranks = RankPool(2)
    try:
        model = save_model(tmp_path / "model", "qwen3")
        expected = ranks(note_gaps, config, model, run, steps)
    finally:
        ranks.close()
    recorder.record(recorder.Recording(run.rollouts, SAMPLING), 4, groups)
    logprobs = expected[0] | expected[1]
    samples = read_samples(run.rollouts, 4)
    assert len(samples) == 4
    for sample in samples:
        own = logprobs[tokens_key(sample.token_ids)]
        assert np.isnan(sample.gaps[0]) and sample.largest_gap > 1
        assert sample.gaps[1:] == pytest.approx([value + 0.5 for value in own[1:]], rel=2e-3)
    files = {path.name for path in run.rollouts.glob("gaps_*")}
    assert files == {"gaps_3-0.npz"} | {f"gaps_4-{rank}.npz" for rank in range(dp_size)}
