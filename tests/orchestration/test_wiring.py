"""Every setting reaches the part that it is for, and no other: a run with one setting changed
differs from the run without the change in exactly what should differ.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoslime import rehearsal, train
from nanoslime.config import RunConfig
from nanoslime.config.model import RehearsalConfig
from nanoslime.orchestration.groups import LocalTrainGroup
from nanoslime.orchestration.session import prepare_model
from nanoslime.rollout.engines.embedded_model import EmbeddedOwner
from nanoslime.run_dir import DONE, RunDir
from nanoslime.training.fsdp import FSDPBackend
from nanoslime.weight_sync.in_process import InProcessSender
from tests.orchestration import wired
from tests.orchestration.wired import Asked, Seen

README = Path(__file__).parents[2] / "README.md"
# What follows from other sampled tokens.
OF_TOKENS = {"tokens", "rewards", "advantages"}
# What follows from another loss of the first rollout.
OF_LOSS = {"loss", "gradient", "weights"}
EVALUATED_OTHERWISE = {"eval sampling", "eval rewards"}
SAMPLED_OTHERWISE = OF_TOKENS | OF_LOSS

LONGER = {"prompts", "seeds", "lr", "weights", "eval seeds", "eval steps"}

TWO_STEPS = {"training.num_steps_per_rollout": 2}
KL_LOSS = {**TWO_STEPS, "algorithm.use_kl_loss": True, "algorithm.kl_loss_coef": 1.0}
KL_REWARD = {"algorithm.kl_coef": 1.0, "training.num_steps_per_rollout": 2}
BUFFER = {"algorithm.overlong_buffer": 4}
COSINE = {"training.lr_schedule": "cosine"}
TIS = {"algorithm.correction.use_tis": True}
RETURNS = {"algorithm.name": "reinforce_plus_plus"}

CASES: list[tuple[dict[str, Any], dict[str, Any], set[str]]] = [
    # rollout
    ({}, {"rollout.temperature": 0.7}, {"sampling"} | SAMPLED_OTHERWISE),
    ({}, {"rollout.top_p": 0.5}, {"sampling"} | SAMPLED_OTHERWISE),
    ({}, {"rollout.top_k": 5}, {"sampling"} | SAMPLED_OTHERWISE),
    ({}, {"rollout.max_new_tokens": 5}, {"sampling"} | EVALUATED_OTHERWISE | SAMPLED_OTHERWISE),
    ({}, {"rollout.n_samples_per_prompt": 4}, {"sampling"} | SAMPLED_OTHERWISE),
    ({}, {"rollout.rollout_batch_size": 3}, {"prompts", "seeds"} | SAMPLED_OTHERWISE),
    (
        {"seed": 2},
        {"rollout.dynamic_sampling_rounds": 9},
        {"prompts", "seeds"} | SAMPLED_OTHERWISE,
    ),
    ({}, {"seed": 1}, {"prompts", "seeds"} | SAMPLED_OTHERWISE),
    ({"data.shuffle": False}, {"seed": 1}, {"seeds"} | SAMPLED_OTHERWISE),
    ({}, {"data.shuffle": False}, {"prompts"} | SAMPLED_OTHERWISE),
    ({}, {"model.dtype": "bfloat16"}, {"eval rewards"} | SAMPLED_OTHERWISE),
    # evaluation
    ({}, {"eval.temperature": 0.5}, EVALUATED_OTHERWISE),
    ({}, {"eval.n_samples_per_prompt": 3}, EVALUATED_OTHERWISE | {"metrics"}),
    ({}, {"eval.max_prompts": 3}, {"eval prompts", "eval seeds", "eval rewards"}),
    ({}, {"eval.seed": 1}, {"eval seeds", "eval rewards"}),
    ({}, {"eval.interval": 1}, {"eval prompts", "eval seeds", "eval steps"}),
    # rewards to advantages
    (
        {},
        {"data.reward": "tests.orchestration.rewards:by_length"},
        {"rewards", "advantages", "eval rewards"} | OF_LOSS,
    ),
    ({}, {"algorithm.filter_zero_std": False}, {"advantages"} | OF_LOSS),
    ({}, {"algorithm.normalize_by_std": False}, {"advantages"} | OF_LOSS),
    ({}, {"algorithm.normalize_advantages": True}, OF_LOSS),
    ({}, BUFFER, {"advantages"} | OF_LOSS),
    ({}, {"algorithm.truncated": "mask"}, OF_LOSS),
    (BUFFER, {"algorithm.overlong_penalty": 3.0}, {"advantages"} | OF_LOSS),
    (RETURNS, {"algorithm.gamma": 0.5}, {"gradient", "weights"}),
    ({}, {"algorithm.name": "rloo"}, {"advantages"} | OF_LOSS),
    # the loss
    ({}, {"algorithm.denominator": "sequences"}, OF_LOSS),
    ({}, {"algorithm.denominator": "fixed"}, OF_LOSS),
    ({}, {"algorithm.entropy_coef": 0.1}, OF_LOSS),
    (TWO_STEPS, {"algorithm.eps_clip": 0.01}, OF_LOSS),
    (TWO_STEPS, {"algorithm.eps_clip_high": 2.0}, OF_LOSS),
    (TWO_STEPS, {"algorithm.eps_clip_c": 1.001}, OF_LOSS | {"metrics"}),
    (TWO_STEPS, {"algorithm.old_logprobs": "recomputed"}, set()),
    (TWO_STEPS, {"algorithm.old_logprobs": "rollout"}, {"passes"}),
    ({}, {"algorithm.old_logprobs": "current"}, set()),
    ({}, {"algorithm.old_logprobs": "recomputed"}, {"passes"}),
    (TWO_STEPS, {"algorithm.name": "cispo"}, OF_LOSS),
    (TWO_STEPS, {"algorithm.name": "gspo"}, OF_LOSS),
    (TWO_STEPS, KL_LOSS, OF_LOSS | {"passes", "metrics"}),
    (KL_LOSS, {"algorithm.kl_loss_coef": 0.5}, OF_LOSS),
    (KL_LOSS, {"algorithm.kl_loss_type": "k1"}, OF_LOSS),
    (KL_LOSS, {"algorithm.kl_loss_type": "k2"}, OF_LOSS),
    (KL_LOSS, {"algorithm.use_unbiased_kl": True}, OF_LOSS),
    (KL_LOSS, {"algorithm.kl_loss_type": "low_var_kl"}, set()),
    (TIS, {"algorithm.correction.tis_clip_low": 1.5}, OF_LOSS),
    (TIS, {"algorithm.correction.tis_clip": 0.5}, OF_LOSS),
    ({}, {"algorithm.correction.reject": "token"}, set()),
    (
        {"algorithm.correction.reject": "token"},
        {"algorithm.correction.reject_low": 1.5},
        OF_LOSS,
    ),
    (
        {"algorithm.correction.reject": "sequence"},
        {"algorithm.correction.reject_low": 0.1, "algorithm.correction.reject_high": 0.5},
        OF_LOSS,
    ),
    # the optimizer
    ({}, TWO_STEPS, OF_LOSS | {"passes"}),
    ({}, {"training.lr": 0.03}, {"lr", "weights"}),
    ({}, {"training.lr_schedule": "linear"}, {"lr", "weights"}),
    ({}, {"training.lr_warmup_steps": 2}, {"lr", "weights"}),
    (COSINE, {"training.min_lr": 0.01}, {"lr", "weights"}),
    (COSINE, {"rollout.num_rollout": 3}, LONGER),
    ({}, {"training.adam_beta1": 0.5}, {"weights"}),
    ({}, {"training.adam_beta2": 0.5}, {"weights"}),
    ({}, {"training.adam_eps": 0.1}, {"weights"}),
    ({}, {"training.weight_decay": 0.5}, {"weights"}),
    ({}, {"training.clip_grad": 0.01}, {"weights"}),
    ({}, {"training.clip_grad": 1e6}, set()),
    ({}, {"training.freeze": ["mlp"]}, {"gradient", "weights"}),
    # what changes nothing
    ({}, {"training.max_tokens_per_microbatch": 1}, set()),
    ({}, {"training.recompute": True}, set()),
    ({}, {"training.optimizer_offload": True}, set()),
    ({}, {"weight_sync.bucket_bytes": 1}, set()),
    ({}, {"weight_sync.transport": "disk"}, set()),
    ({}, {"checkpoint.interval": 1}, set()),
    ({}, {"cluster.colocate": True}, set()),
]


def case_id(value: Any) -> str:
    if isinstance(value, set):
        return ""
    return " ".join(f"{name.rpartition('.')[2]}={changed}" for name, changed in value.items())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> wired.Files:
    return wired.make_files(tmp_path_factory.mktemp("wired"))


@pytest.fixture(scope="module")
def run_once(tmp_path_factory, files):
    """Makes each run once, whoever asks for it."""
    made: dict[str, Seen] = {}

    def make(changes: Mapping[str, Any]) -> Seen:
        key = json.dumps(changes, sort_keys=True)
        if key not in made:
            made[key] = wired.run(files, tmp_path_factory.mktemp("run"), changes)
        return made[key]

    return make


@pytest.mark.parametrize(("before", "change", "expected"), CASES, ids=case_id)
def test_a_setting_changes_what_it_is_for_and_nothing_else(run_once, before, change, expected):
    one = aspects(run_once(before))
    other = aspects(run_once({**before, **change}))
    assert {name for name in one if not alike(one[name], other[name])} == expected


def aspects(seen: Seen) -> dict[str, Any]:
    """What can be told apart in a run; of what training changes, the first rollout's."""
    samples = [sample for group in seen.rollout(0) for sample in group.samples]
    rows = seen.rows
    return {
        "prompts": [asked.prompt for asked in seen.of_training],
        "sampling": {sampling(asked) for asked in seen.of_training},
        "seeds": [asked.request.seed for asked in seen.of_training],
        "tokens": [sample.token_ids.tolist() for sample in samples],
        "rewards": [sample.reward for sample in samples],
        "advantages": [sample.advantage for sample in samples],
        "passes": seen.passes[: len(seen.passes) // len(rows)],
        "loss": rows[0]["train/loss"],
        "gradient": rows[0]["train/grad_norm"],
        "lr": [row["train/lr"] for row in rows],
        "weights": {name: tensor.flatten().tolist() for name, tensor in seen.weights.items()},
        "metrics": {name for row in rows for name in row if not name.startswith("time/")},
        "eval prompts": [asked.prompt for asked in seen.of_evaluation],
        "eval sampling": {sampling(asked) for asked in seen.of_evaluation},
        "eval seeds": [asked.request.seed for asked in seen.of_evaluation],
        "eval steps": [record["step"] for record in seen.evals],
        "eval rewards": seen.evals[0]["reward"],
    }


def sampling(asked: Asked) -> tuple[Any, ...]:
    request = asked.request
    settings = (request.n, request.max_new_tokens, request.temperature, request.top_p)
    return (*settings, request.top_k, request.stop_token_ids)


def alike(one: Any, other: Any) -> bool:
    """Whether two aspects are the same, numbers within what rounding makes of them."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-4)
    return bool(one == other)


def test_no_two_requests_share_a_seed(run_once):
    """Neither the samples of a prompt, nor the prompts of a rollout, nor rollouts, nor
    evaluations; nor training with an evaluation of the same seed.
    """
    asked = run_once({}).asked
    assert len(asked) == 2 * 4 * 3 + 2 * wired.NUM_HELD_OUT
    assert len({one.request.seed for one in asked}) == len(asked)


def test_equal_prompts_are_sampled_differently(tmp_path, files):
    same = tmp_path / "same.jsonl"
    same.write_text('{"prompt": "t1=", "label": 1}\n' * 4)
    seen = wired.run(files, tmp_path, {"data.prompts": str(same)})
    texts = [sample.text for step in (0, 1) for g in seen.rollout(step) for sample in g.samples]
    assert len(set(texts)) > 20  # of 24; a few are as short as one token


def test_every_epoch_has_each_prompt_once_in_an_order_of_its_own(tmp_path, files):
    seen = wired.run(files, tmp_path, {"rollout.rollout_batch_size": wired.NUM_TRAIN})
    prompts = [asked.prompt for asked in seen.of_training]
    first, second = prompts[: wired.NUM_TRAIN], prompts[wired.NUM_TRAIN :]
    assert len(set(first)) == wired.NUM_TRAIN
    assert sorted(first) == sorted(second) and first != second


def test_a_resumed_run_is_labelled_and_sampled_as_the_uninterrupted_one(tmp_path, run_once, files):
    """The engine's version is the number of rollouts done, also after the resume."""
    straight = run_once({"rollout.num_rollout": 3})
    resumed = wired.run(files, tmp_path, {"rollout.num_rollout": 1})
    assert train.main(["--resume", str(resumed.run.path), "--num-rollout", "3"]) == DONE
    for step in range(3):
        one, other = (
            [
                (s.policy_versions, s.token_ids.tolist())
                for g in run.rollout(step)
                for s in g.samples
            ]
            for run in (straight, resumed)
        )
        assert one == other
        assert {version for versions, _ in one for _, version in versions} == {step}
    records = [(record["step"], record["version"]) for record in resumed.evals]
    assert records == [(-1, 0), (0, 1), (2, 3)]


def test_a_replay_shapes_and_weighs_as_the_recorded_run(tmp_path, run_once, files):
    """By the longest response that the samples could have."""
    settings = {**BUFFER, "algorithm.denominator": "fixed"}
    recorded = run_once(settings)
    again = {**settings, "rollout.load_rollouts": str(recorded.run.path), "data.eval_prompts": ""}
    replayed = wired.run(files, tmp_path, again)
    for row, expected in zip(replayed.rows, recorded.rows, strict=True):
        for name in ("train/loss", "train/grad_norm", "rollout/reward_mean"):
            assert row[name] == expected[name], name
    assert wired.same_tensors(replayed.weights, recorded.weights)


def test_buckets_and_deadlines_reach_those_who_keep_them(tmp_path, files, monkeypatch):
    seen = {}
    make_sender = InProcessSender.__init__
    call = LocalTrainGroup.call
    start = EmbeddedOwner.start

    def sender(self: Any, rank: Any, engines: Any) -> None:
        seen["rank's deadline"] = rank.deadline_s
        seen["bucket"] = rank.bucket_bytes
        make_sender(self, rank, engines)

    def called(self: Any, method: str, *args: Any, **options: Any) -> Any:
        if method == "send":
            seen["send's deadline"] = options["deadline_s"]
        return call(self, method, *args, **options)

    def started(self: Any, deadline_s: float) -> Any:
        seen["engine's deadline"] = deadline_s
        return start(self, deadline_s)

    monkeypatch.setattr(InProcessSender, "__init__", sender)
    monkeypatch.setattr(LocalTrainGroup, "call", called)
    monkeypatch.setattr(EmbeddedOwner, "start", started)
    changes = {"weight_sync.deadline_s": 77.0, "weight_sync.bucket_bytes": 1}
    wired.run(files, tmp_path, {**changes, "rollout.start_deadline_s": 55.0})
    assert seen == {
        "rank's deadline": 77.0,
        "send's deadline": 3 * 77.0,
        "engine's deadline": 55.0,
        "bucket": 1,
    }


def test_a_rehearsal_evaluates_on_what_it_does_not_train_on(tmp_path, files, monkeypatch):
    monkeypatch.setattr(rehearsal, "make", lambda directory, knobs: files)
    config = RunConfig(rehearsal=RehearsalConfig(enabled=True))
    config, model_dir = prepare_model(config, RunDir(tmp_path))
    assert (config.data.prompts, config.data.eval_prompts) == (
        str(files.train),
        str(files.held_out),
    )
    assert model_dir == files.model


KEEPING = {
    "rollout.num_rollout": 5,
    "eval.interval": 1,
    "eval.seed": 10,  # by which the best evaluation is not the last
    "checkpoint.interval": 1,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_best": True,
}


def checkpoints(seen: Seen) -> set[int]:
    """The rollouts after which a checkpoint is left."""
    paths = seen.run.checkpoints.iterdir()
    return {int(path.name.removeprefix("step_")) for path in paths}


def test_the_checkpoints_that_stay_are_those_that_are_asked_for(run_once):
    seen = run_once(KEEPING)
    rewards = {record["step"] + 1: record["reward"] for record in seen.evals[1:]}
    best = max(rewards, key=rewards.__getitem__)
    assert best < 5 and checkpoints(seen) == {best, 5}
    for rollouts in checkpoints(seen):
        state = json.loads((seen.run.checkpoint(rollouts) / "driver.json").read_text())
        assert (state["rollouts"], state["policy_version"]) == (rollouts, rollouts)
        so_far = {step: reward for step, reward in rewards.items() if step <= rollouts}
        best_so_far = max(so_far, key=so_far.__getitem__)
        assert state["best"] == [so_far[best_so_far], best_so_far]
    last = {**KEEPING, "checkpoint.keep_best": False}
    assert checkpoints(run_once(last)) == {5}
    assert checkpoints(run_once({**last, "checkpoint.keep_every": 2})) == {2, 4, 5}
    assert checkpoints(run_once({**last, "checkpoint.keep_last": 3})) == {3, 4, 5}


def test_the_best_checkpoint_is_known_after_a_resume(tmp_path, run_once, files):
    """Also where no later evaluation is better."""
    best = max(run_once(KEEPING).evals[1:], key=lambda record: record["reward"])["step"] + 1
    changes = {**KEEPING, "rollout.num_rollout": best}
    seen = wired.run(files, tmp_path, changes)
    assert train.main(["--resume", str(seen.run.path), "--num-rollout", "5"]) == DONE
    assert checkpoints(seen) == {best, 5}
    assert [record["reward"] for record in seen.evals] == [
        record["reward"] for record in run_once(KEEPING).evals
    ]


def test_what_a_killed_run_left_half_written_is_removed(tmp_path, files):
    seen = wired.run(files, tmp_path, {"rollout.num_rollout": 1})
    half = seen.run.checkpoints / "step_2.partial"
    half.mkdir()
    assert train.main(["--resume", str(seen.run.path), "--num-rollout", "3"]) == DONE
    assert checkpoints(seen) == {1, 3}


def test_rows_summary_and_status_tell_of_the_run(run_once):
    seen = run_once(KEEPING)
    rows = seen.rows
    assert [row["step"] for row in rows] == list(range(5))
    rewards = [record["reward"] for record in seen.evals]
    assert [row["eval/reward_mean"] for row in rows] == rewards[1:]
    phases = {"generate", "logprobs", "train", "weight_sync"}
    assert all(row[f"time/{phase}_s"] > 0 for row in rows for phase in phases)
    summary = json.loads(seen.run.summary.read_text())
    assert (summary["reward_before"], summary["reward_after"]) == (rewards[0], rewards[-1])
    assert summary["logprob_gap_max"] == max(row["train/logprob_gap_max"] for row in rows)
    assert summary["steps"] == 5
    assert (seen.run.status()["phase"], seen.run.status()["step"]) == ("done", 5)


EVERY_METRIC = {
    **KL_LOSS,
    "eval.interval": 1,
    "algorithm.eps_clip_c": 2.0,
    "algorithm.correction.use_tis": True,
    "algorithm.correction.use_opsm": True,
}


def test_the_readme_names_the_metrics_of_a_row(run_once):
    """Of every area but the seconds of phases."""
    areas = ("rollout", "train", "eval", "weight_sync")
    named = re.findall(rf"`((?:{'|'.join(areas)})/[a-z0-9_]+)`", README.read_text())
    assert len(named) == len(set(named))
    row = run_once(EVERY_METRIC).rows[0]
    # The names of an evaluation set's own have the set in them.
    found = {name for name in row if name.partition("/")[0] in areas and name.count("/") == 1}
    assert found == set(named)


def test_an_export_is_made_where_one_is_asked_for(run_once):
    """It has the dtype of the model, which is also that of what engines get."""
    assert not run_once({"checkpoint.export_hf": False}).run.hf(2).exists()
    half = run_once({"model.dtype": "bfloat16"}).weights
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}


def test_a_skipped_step_leaves_its_batch_in_the_run(tmp_path, files, monkeypatch):
    """The second rollout's, which is counted; the learning rate goes on."""
    norms = [1.0, math.inf, 1.0]
    monkeypatch.setattr(FSDPBackend, "_grad_norm", lambda backend: norms.pop(0))
    changes = {"rollout.num_rollout": 3, "training.lr_schedule": "linear"}
    seen = wired.run(files, tmp_path, changes)
    assert [row["train/num_skipped"] for row in seen.rows] == [0, 1, 1]
    assert [row["train/lr"] for row in seen.rows] == pytest.approx([0.02, 0.04 / 3, 0.02 / 3])
    assert [path.name for path in seen.run.skipped.iterdir()] == ["step_1"]
