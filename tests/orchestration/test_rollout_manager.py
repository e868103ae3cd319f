"""Evaluation where some samples, or all of them, cannot be made; rounds of sampling until
a batch is full.
"""

import json
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanoslime.config import DataConfig, EvalConfig, RolloutConfig, RunConfig
from nanoslime.orchestration.rollout_manager import RolloutManager
from nanoslime.rollout import recorder
from nanoslime.rollout.engines.embedded_model import EmbeddedEngine
from nanoslime.rollout.producer import Serving
from nanoslime.rollout.prompts import RunPrompts
from nanoslime.rollout.tasks import WorkerSetup
from nanoslime.rollout.worker import RolloutWorker
from nanoslime.run_dir import RunDir
from nanoslime.types import GenerateRequest, Generation, GroupReport, RunError

FINE = "ab"
TOO_LONG = "a" * 4096  # the model's context is 4096 tokens


@dataclass
class Weights:
    version: int


def write_prompts(path: Path, prompts: list[str]) -> None:
    """Every third prompt has a label that is not zero."""
    rows = [{"prompt": prompt, "label": int(i % 3 == 0)} for i, prompt in enumerate(prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def manager(
    tmp_path: Path,
    model: Path,
    held_out: list[str],
    train: list[str] | None = None,
    reward: str = "always_one",
    name: str = "run",
    engine: type[EmbeddedEngine] = EmbeddedEngine,
    **rollout: Any,
) -> RolloutManager:
    write_prompts(tmp_path / "train.jsonl", train or [FINE])
    write_prompts(tmp_path / "held_out.jsonl", held_out)
    config = RunConfig(
        rollout=RolloutConfig(engine="embedded", max_new_tokens=4, **rollout),
        eval=EvalConfig(n_samples_per_prompt=2),
        data=DataConfig(
            prompts=str(tmp_path / "train.jsonl"),
            eval_prompts=str(tmp_path / "held_out.jsonl"),
            max_prompt_tokens=5000,
            chat_template="off",
            reward=f"tests.orchestration.rewards:{reward}",
        ),
    )
    run = RunDir.create(tmp_path, name)
    engines = [engine(str(model), "float32", "cpu", seed=0)]
    prompts = RunPrompts.load(config, model)
    worker = RolloutWorker(WorkerSetup(config, model, run.rollouts))
    worker.set_engines(engines)
    serving = Serving([worker], lost=lambda name, cause: None, service=lambda: False)
    made = RolloutManager(config, run, prompts, Weights(version=0), serving)
    OPEN[made] = worker
    return made


OPEN: dict[RolloutManager, RolloutWorker] = {}


@pytest.fixture(autouse=True)
def closed():
    yield
    for made in list(OPEN):
        close(made)


def close(made: RolloutManager) -> None:
    """Then everything is on record."""
    made.close()
    OPEN.pop(made).close()


def test_a_sample_that_cannot_be_made_counts_as_reward_0(tmp_path, tiny_model, caplog):
    rollout = manager(tmp_path, tiny_model, [FINE, TOO_LONG, FINE, FINE])
    assert rollout.evaluate(3)["eval/reward_mean"] == 0.75
    [warning] = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warning == (
        "evaluation: 2 of 8 samples could not be made and count as reward 0: "
        "a prompt of 4096 tokens fills the model's context"
    )
    record = json.loads(rollout.run.evals.read_text())
    assert (record["step"], record["reward"], record["samples"]) == (3, 0.75, 8)


def test_an_evaluation_without_any_sample_ends_the_run(tmp_path, tiny_model):
    rollout = manager(tmp_path, tiny_model, [TOO_LONG])
    message = "2 of 2 samples could not be made; first: prompt 0: a prompt of"
    with pytest.raises(RunError, match=message):
        rollout.evaluate(-1)
    assert not rollout.run.evals.exists()


def test_a_rollout_without_any_sample_ends_the_run(tmp_path, tiny_model):
    rollout = manager(tmp_path, tiny_model, [FINE], [TOO_LONG], rollout_batch_size=2)
    message = (
        "rollout 0: 16 of 16 samples could not be made; first: prompt 0: a prompt of "
        r"4096 tokens fills the model's context \(16 samples\)"
    )
    with pytest.raises(RunError, match=message):
        rollout.generate(0)
    close(rollout)
    # What the engine was asked for and what it said is on record.
    assert (rollout.run.rollouts / "step_0-0.jsonl").read_text().count("4096 tokens") == 16


def test_a_cause_is_told_once_in_a_run_and_counted_in_every_rollout(tmp_path, tiny_model, caplog):
    rollout = manager(tmp_path, tiny_model, [FINE], [FINE, TOO_LONG], rollout_batch_size=2)
    for step in range(2):
        rollout.generate(step)
        assert rollout.metrics["rollout/error_ratio"] == 0.5
        assert rollout.metrics["rollout/dropped_sample_error"] == 8
    told = [r.getMessage() for r in caplog.records if "could not be made" in r.getMessage()]
    assert told == [
        "rollout 0: 8 of 16 samples could not be made and are left out: "
        "a prompt of 4096 tokens fills the model's context"
    ]


def test_equal_rewards_are_no_failure(tmp_path, tiny_model):
    rollout = manager(tmp_path, tiny_model, [FINE], rollout_batch_size=2)
    assert rollout.generate(0) == []
    assert rollout.metrics["rollout/dropped_group_zero_std"] == 2


PROMPTS = ["a", "b", "ab", "ba", "aa", "bb", "aab"]


def sampling(
    tmp_path: Path,
    model: Path,
    rounds: int,
    reward: str = "by_text_where_labelled",
    name: str = "run",
) -> RolloutManager:
    """Prompts 0, 3 and 6 are the only ones whose groups differ in reward."""
    return manager(
        tmp_path,
        model,
        [FINE],
        PROMPTS,
        reward=reward,
        name=name,
        rollout_batch_size=3,
        n_samples_per_prompt=3,
        dynamic_sampling_rounds=rounds,
    )


def ids(groups: list[GroupReport]) -> list[tuple[int, int]]:
    return [(g.group_id, g.samples[0].prompt_id) for g in groups]


def tokens(groups: list[GroupReport]) -> list[list[int]]:
    return [s.arrays.token_ids.tolist() for g in groups for s in g.samples]


def test_without_further_rounds_what_is_filtered_is_missing(tmp_path, tiny_model):
    rollout = sampling(tmp_path, tiny_model, 1)
    kept = [rollout.generate(step) for step in range(3)]
    assert all(len(groups) < 3 for groups in kept)
    [cursor] = rollout.save(tmp_path / "state")["prompts"].values()
    assert cursor["num_taken"] == 9  # 3 x 3 prompts of 7
    assert not (tmp_path / "state").exists(), "nothing is being sampled"


def test_further_prompts_are_sampled_until_the_batch_is_full(tmp_path, tiny_model):
    """As many as were filtered, in the order of the prompts."""
    rollout = sampling(tmp_path, tiny_model, 20)
    num_sampled = []
    for step in range(2):
        kept = rollout.generate(step)
        assert len(kept) == 3 and all(prompt % 3 == 0 for _, prompt in ids(kept))
        assert all(any(s.advantage for s in g.samples) for g in kept)
        num_sampled.append(int(rollout.metrics["rollout/num_samples"]) // 3)
        num_dropped = rollout.metrics["rollout/dropped_group_zero_std"]
        assert num_dropped == num_sampled[-1] - 3 > 0
    close(rollout)
    first = 0
    for step, number in enumerate(num_sampled):
        lines = (rollout.run.rollouts / f"step_{step}-0.jsonl").read_text().splitlines()
        assert len(lines) == 3 * number  # what was filtered is on record too
        entries = [json.loads(line) for line in lines]
        assert sorted({entry["group"] for entry in entries}) == list(range(first, first + number))
        first += number


def test_rounds_are_bounded(tmp_path, tiny_model, caplog):
    rollout = sampling(tmp_path, tiny_model, 2, reward="always_one")
    assert rollout.generate(0) == []
    assert "left to train on, dropped for: {'group_zero_std': 6}" in caplog.text
    # two rounds of three prompts, three samples each
    assert rollout.metrics["rollout/num_samples"] == 18


def test_the_data_cursor_resumes_exactly_after_further_rounds(tmp_path, tiny_model):
    straight = sampling(tmp_path, tiny_model, 20, name="straight")
    expected = [straight.generate(step) for step in range(3)]
    state = None
    for step in range(3):  # a new process for every rollout
        resumed = sampling(tmp_path, tiny_model, 20, name=f"resumed{step}")
        if state is not None:
            resumed.load(tmp_path / "state", state)
        got = resumed.generate(step)
        assert ids(got) == ids(expected[step]) and tokens(got) == tokens(expected[step])
        state = json.loads(json.dumps(resumed.save(tmp_path / "state")))
    assert state["prompts"] == straight.save(tmp_path / "state")["prompts"]


def test_a_checkpoint_without_a_data_cursor_is_refused(tmp_path, tiny_model):
    no_cursor = sampling(tmp_path, tiny_model, 1, name="no_cursor")
    with pytest.raises(RunError, match="of a run with rollout.load_rollouts, which has no data cu"):
        no_cursor.load(tmp_path / "state", {})


def test_a_sample_of_another_version_ends_the_run(tmp_path, tiny_model):
    """Older or newer: the engine's weights are not those that the trainer has."""
    for version in (-1, 1):
        reward = "by_text_where_labelled"
        rollout = manager(tmp_path, tiny_model, [FINE], reward=reward, name=f"run{version}")
        rollout._weights.version = version
        message = f"group 0 was sampled by policy version 0, the trainer is at {version}"
        with pytest.raises(RunError, match=message):
            rollout.generate(0)
        assert not list(rollout.run.rollouts.iterdir())


def test_a_sample_whose_later_tokens_are_of_an_older_version_ends_the_run(tmp_path, tiny_model):
    """Each of them is within the bound: some engine's label is wrong."""
    rollout = manager(tmp_path, tiny_model, [FINE], max_staleness=2)
    rollout._weights.version = 6
    for versions in ([4, 5], [5, 5], [6]):
        rollout._check_versions([group_of(versions)])
    for versions in ([5, 4], [4, 6, 5]):
        with pytest.raises(RunError, match=re.escape(f"are of policy versions {versions}")):
            rollout._check_versions([group_of(versions)])


def group_of(versions: list[int]) -> Any:
    sample = SimpleNamespace(policy_versions=list(enumerate(versions)))
    return SimpleNamespace(group_id=3, samples=[sample])


def test_the_data_cursor_is_of_the_moment_in_which_the_groups_are_saved(tmp_path, tiny_model):
    """Groups that finish, or are replaced, while the checkpoint is written belong to the next."""
    settings = {"rollout_batch_size": 3, "dynamic_sampling_rounds": 20, "max_staleness": 2}
    rollout = manager(tmp_path, tiny_model, [FINE], PROMPTS, **settings)
    source = rollout._source
    admission = rollout._producer._admission
    cursor = source.state_dict

    def slow_cursor() -> dict[str, Any]:
        num_admitted = admission.next_group_id
        deadline = time.monotonic() + 0.5
        while admission.next_group_id == num_admitted and time.monotonic() < deadline:
            time.sleep(0.01)
        return cursor()

    source.state_dict = slow_cursor
    rollout.set_version(0)
    state = rollout.save(tmp_path / "state")
    saved = json.dumps(state)
    while admission.next_group_id == state["producer"]["admission"]["next_group_id"]:
        time.sleep(0.01)
    assert json.dumps(state) == saved
    [cursor] = state["prompts"].values()
    assert cursor["num_taken"] == state["producer"]["admission"]["next_group_id"]


class OfVersion1(EmbeddedEngine):
    def policy_version(self) -> int:
        return 1

    async def generate(self, request: GenerateRequest) -> list[Generation]:
        answers = await super().generate(request)
        return [replace(answer, versions=[(0, 1)]) for answer in answers]


def test_what_was_filtered_may_be_older_than_a_bound_that_a_resume_made_smaller(
    tmp_path, tiny_model
):
    """It goes on record with the next rollout, and trains nothing."""
    settings = {"reward": "by_text_where_labelled", "rollout_batch_size": 3}
    settings |= {"n_samples_per_prompt": 3, "dynamic_sampling_rounds": 20}
    before = manager(tmp_path, tiny_model, [FINE], PROMPTS, max_staleness=2, **settings)
    before.generate(0)
    before.set_version(1)
    admission = before._producer._admission
    deadline = time.monotonic() + 60
    while not admission.replaced:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    state = before.save(tmp_path / "state")
    close(before)
    of_version_0 = state["producer"]["admission"]["replaced"]

    settings |= {"name": "resumed", "engine": OfVersion1}
    resumed = manager(tmp_path, tiny_model, [FINE], PROMPTS, **settings)
    resumed._weights.version = 1
    resumed.load(tmp_path / "state", state)
    kept = resumed.generate(1)
    assert len(kept) == 3 and resumed.metrics["rollout/staleness_max"] == 0
    close(resumed)
    recorded = {group.group_id for group in recorder.load(resumed.run.rollouts, 1)}
    assert recorded >= {*of_version_0, *(group.group_id for group in kept)}


class UpdatedOnTheWay(EmbeddedEngine):
    async def generate(self, request: GenerateRequest) -> list[Generation]:
        answers = await super().generate(request)
        return [replace(answer, versions=[(0, 0), (2, 1)]) for answer in answers]


def test_a_token_of_another_version_in_the_middle_ends_the_run(tmp_path, tiny_model):
    """A weight update may pause a sample and change the policy under it."""
    reward = "by_text_where_labelled"
    rollout = manager(tmp_path, tiny_model, [FINE], reward=reward, engine=UpdatedOnTheWay)
    with pytest.raises(RunError, match="sampled by policy version 1, the trainer is at 0"):
        rollout.generate(0)
