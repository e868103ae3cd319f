"""Evaluation where some samples, or all of them, cannot be made."""

import json
from pathlib import Path

import pytest

from nanoslime.config import DataConfig, EvalConfig, RolloutConfig, RunConfig
from nanoslime.orchestration.rollout_manager import RolloutManager
from nanoslime.rollout.embedded import EmbeddedEngine
from nanoslime.run_dir import RunDir
from nanoslime.types import RunError

FINE, TOO_LONG = "ab", "a" * 4096  # the model's context is 4096 tokens


def manager(tmp_path: Path, model: Path, held_out: list[str]) -> RolloutManager:
    for name, prompts in (("train", [FINE]), ("held_out", held_out)):
        lines = [json.dumps({"prompt": p, "label": "x"}) + "\n" for p in prompts]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    config = RunConfig(
        rollout=RolloutConfig(engine="embedded", max_new_tokens=4),
        eval=EvalConfig(n_samples_per_prompt=2),
        data=DataConfig(
            prompts=str(tmp_path / "train.jsonl"), eval_prompts=str(tmp_path / "held_out.jsonl"),
            max_prompt_tokens=5000, chat_template="off", reward="tests.orchestration.rewards:always_one",
        ),
    )  # fmt: skip
    engine = EmbeddedEngine(str(model), "float32", "cpu", seed=0)
    run = RunDir.create(tmp_path, "run")
    return RolloutManager(config, run, model, [engine])


def test_a_sample_that_cannot_be_made_counts_as_reward_0(tmp_path, tiny_model, caplog):
    rollout = manager(tmp_path, tiny_model, [FINE, TOO_LONG, FINE, FINE])
    assert rollout.evaluate(3) == 0.75
    [warning] = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warning.startswith("evaluation: 2 of 8 samples could not be made and count as reward 0; first: ")
    assert "prompt 1: a prompt of 4096 tokens fills the model's context" in warning
    record = json.loads(rollout.run.evals.read_text())
    assert (record["step"], record["reward"], record["samples"]) == (3, 0.75, 8)
    rollout.close()


def test_an_evaluation_without_any_sample_ends_the_run(tmp_path, tiny_model):
    rollout = manager(tmp_path, tiny_model, [TOO_LONG])
    with pytest.raises(RunError, match="2 of 2 samples could not be made; first: prompt 0: a prompt of"):
        rollout.evaluate(-1)
    assert not rollout.run.evals.exists()
    rollout.close()
