"""Several evaluation sets, each with prompts, sampling and reward of its own, on the real loop."""

import json
import logging
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM

from nanoslime.config import RunConfig
from nanoslime.orchestration.evaluation import Evaluation
from nanoslime.rollout.prompts import RunPrompts
from nanoslime.rollout.tasks import GroupTask
from nanoslime.run_dir import RunDir
from nanoslime.types import SampleGroup
from tests.algorithms.made import group
from tests.orchestration import wired

LENGTH = "tests.orchestration.rewards:by_length"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> wired.Files:
    return wired.make_files(tmp_path_factory.mktemp("wired"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of another set, in columns of other names."""
    path = tmp_path_factory.mktemp("other") / "other.jsonl"
    lines = [json.dumps({"question": f"o{i}=", "answer": 1}) + "\n" for i in range(5)]
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def seen(tmp_path_factory, files, other) -> wired.Seen:
    sets = [
        {"name": "greedy", "prompts": str(files.held_out), "temperature": 0, "max_prompts": 3},
        {
            "name": "other",
            "prompts": str(other),
            "prompt_key": "question",
            "label_key": "answer",
            "n_samples_per_prompt": 4,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 50,
            "max_new_tokens": 5,
            "reward": LENGTH,
            "pass_reward": 4.0,
        },
    ]
    changes = {"eval.sets": sets, "eval.n_samples_per_prompt": 2}
    return wired.run(files, tmp_path_factory.mktemp("run"), changes)


def test_each_set_has_a_row_an_evaluation(seen):
    rows = [(row["step"], row["version"], row["set"]) for row in seen.evals]
    names = ("held_out", "greedy", "other")
    assert rows == [(-1, 0, name) for name in names] + [(1, 2, name) for name in names]
    assert [row["samples"] for row in seen.evals[:3]] == [20, 3, 20]
    assert [row["prompts"] for row in seen.evals[:3]] == [10, 3, 5]


def test_each_set_is_sampled_in_its_own_way(seen):
    asked = {}
    for one in seen.asked:
        asked.setdefault((one.prompt[0], one.request.top_k), one.request)
    held_out, greedy, other = asked["h", -1], asked["h", 1], asked["o", 50]
    assert (held_out.temperature, held_out.top_p, held_out.top_k) == (1.0, 1.0, -1)
    assert (greedy.top_k, greedy.top_p, greedy.max_new_tokens) == (1, 1.0, 8)
    assert (other.temperature, other.top_p, other.top_k) == (0.7, 0.9, 50)
    assert other.max_new_tokens == 5


def test_greedy_samples_do_not_depend_on_their_seed(seen):
    """Also not where they are drawn beside others, in one batch."""
    of_held_out = [one for one in seen.asked if one.prompt.startswith("h")]
    greedy = [one for one in of_held_out if one.request.top_k == 1]
    assert len({one.request.seed for one in greedy}) == len(greedy) == 6
    model = AutoModelForCausalLM.from_pretrained(seen.files.model, dtype=torch.float32)
    for one in greedy[:3]:
        tokens = list(one.request.token_ids)
        for token in one.answers[0].token_ids:
            assert model(torch.tensor([tokens])).logits[0, -1].argmax() == token
            tokens.append(token)


def test_a_set_has_a_reward_and_a_bar_of_its_own(seen):
    by_prompt = defaultdict(list)
    for one in seen.asked:
        if one.prompt.startswith("o"):
            [answer] = one.answers
            text = wired.TOKENIZER.decode(answer.token_ids, skip_special_tokens=True)
            by_prompt[one.prompt].append(len(text))
    # The first evaluation asks for four samples of each prompt, the second for as many again.
    lengths = [of_prompt[:4] for of_prompt in by_prompt.values()]
    row = seen.evals[2]
    assert row["reward"] == row["mean@4"] == pytest.approx(sum(map(sum, lengths)) / 20)
    passed = [sum(length >= 4 for length in of_prompt) / 4 for of_prompt in lengths]
    assert row["pass@1"] == pytest.approx(sum(passed) / 5)
    assert 0 < row["pass@1"] < row["pass@2"] < 1


def test_the_tracker_gets_the_metrics_of_every_set(seen):
    *_, last = seen.rows
    for row in seen.evals[3:]:
        for name in ("pass@1", "pass@1_se", "truncated_ratio", "response_tokens_mean"):
            assert last[f"eval/{row['set']}/{name}"] == row[name]
    assert last["eval/reward_mean"] == seen.evals[3]["reward"]


def test_the_summary_is_of_the_first_set(seen):
    summary = json.loads(seen.run.summary.read_text())
    assert summary["reward_before"] == seen.evals[0]["reward"] != seen.evals[2]["reward"]
    assert summary["reward_after"] == seen.evals[3]["reward"] != seen.evals[5]["reward"]


def made(root: Path, files: wired.Files, changes: Mapping[str, Any]) -> Evaluation:
    """The evaluations of a run with these settings, whose samples come from a test."""
    config = TypeAdapter(RunConfig).validate_python(wired.settings(files, changes))
    prompts = RunPrompts.load(config, files.model)
    return Evaluation(config, RunDir.create(root, "run"), prompts)


def rewarded(task: GroupTask, rewards: list[float]) -> SampleGroup:
    return group(task.group_id, rewards)


def test_a_line_tells_each_estimate_with_its_error(tmp_path, files, caplog):
    caplog.set_level(logging.INFO, "nanoslime")
    evaluation = made(tmp_path, files, {})
    evaluation.run(0, 1, lambda tasks: [rewarded(task, [1.0, 0.0]) for task in tasks])
    [line] = [r.getMessage() for r in caplog.records if "evaluation of" in r.getMessage()]
    assert line == (
        "evaluation of held_out after 1 rollouts: mean@2 0.5000 ± 0.0000, pass@1 0.5000 ± 0.0000, "
        "pass@2 1.0000 ± 0.0000; 20 samples of 10 prompts, 0% truncated, 2 tokens on average"
    )


def test_groups_are_told_apart_by_their_id_whatever_their_order(tmp_path, files):
    sets = [{"name": "two", "prompts": str(files.held_out), "max_prompts": 2}]
    evaluation = made(tmp_path, files, {"eval.sets": sets})
    tasks = [task for of_set in evaluation.tasks(0) for task in of_set]
    assert len({task.group_id for task in tasks}) == len({task.seed for task in tasks}) == 12
    assert all(task.group_id < 0 and task.purpose == "eval" for task in tasks)

    def sample(asked):
        of_two = {task.group_id for task in evaluation.tasks(0)[1]}
        return [rewarded(task, [float(task.group_id in of_two)]) for task in reversed(asked)]

    metrics = evaluation.run(0, 1, sample)
    assert metrics["eval/held_out/mean@1"] == metrics["eval/reward_mean"] == 0.0
    assert metrics["eval/two/mean@1"] == 1.0


def test_without_a_set_there_is_no_evaluation(tmp_path, files):
    evaluation = made(tmp_path, files, {"data.eval_prompts": ""})
    assert evaluation.run(0, 1, pytest.fail) == {}
    assert not evaluation._run.evals.exists()
