"""Environments trained through the whole loop: embedded engine, rewards, FSDP, weight sync."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from nanoslime import train
from nanoslime.rollout import recorder
from nanoslime.run_dir import DONE, RunDir
from nanoslime.types import Sample, Status
from tests.rollout.calling_model import save_calling_model, tokenizer_of

FLAGS = """--mock --num-rollout 3 --rollout-batch-size 4 --n-samples-per-prompt 8
    --max-new-tokens 24 --lr 1e-3 --no-use-tensorboard --rehearsal.enabled=false
    --training.lr-warmup-steps 0 --denominator tokens
    --max-prompt-tokens 16 --reward tests.orchestration.rewards:share_of_odd_digits"""
HERE = "tests.rollout.environments"
# What an environment writes between the turns of the model.
CASES = {
    "calculator": ({"max_calls": 2}, r"(<result>[^<]*</result>)*"),
    "self_check": ({"question": "check:="}, r"(check:=)?"),
    "agent": ({"agent": f"{HERE}.agents:two_turns"}, r"(check:=)?"),
    "verifiers": ({"id": f"{HERE}.two_turn_verifiers"}, r"(check:=)?"),
}
needs_verifiers = pytest.mark.skipif(
    find_spec("verifiers") is None, reason="verifiers is installed on request only"
)


@pytest.mark.parametrize(
    "environment",
    ["calculator", "self_check", "agent", pytest.param("verifiers", marks=needs_verifiers)],
)
def test_an_environment_is_trained_by_one_flag(tmp_path: Path, environment: str) -> None:
    """The gradient of the first step is that of the generated tokens alone."""
    model = save_calling_model(tmp_path / "model")
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"{number}=", "label": number} for number in range(8)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options, observed = CASES[environment]
    flags = [*FLAGS.split(), "--run-root", tmp_path, "--name", "run"]
    flags += ["--hf-checkpoint", model, "--prompts", prompts, "--environment", environment]
    flags += ["--environment-options", json.dumps(options)]
    assert train.main([str(flag) for flag in flags]) == DONE

    run = RunDir.open(tmp_path / "run")
    metrics = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert len(metrics) == 3
    assert all(np.isfinite(row["train/loss"]) for row in metrics)
    num_turns = 0
    for step in range(3):
        groups = recorder.load(run.rollouts, step)
        samples = [sample for group in groups for sample in group.samples]
        assert len(samples) == 32
        for sample in samples:
            check_tokens(sample, step, observed, tokenizer_of(model))
            num_turns += len(sample.policy_versions)
    assert num_turns > 1.1 * 3 * 32, "more than one turn of the model in many samples"
    groups = recorder.load(run.rollouts, 0)
    norm = gradient_norm(model, [sample for group in groups for sample in group.samples])
    assert metrics[0]["train/grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_samples_of_an_environment_that_raises_or_hangs_are_left_out(tmp_path, caplog) -> None:
    """The other samples of their groups, and the other groups, are trained on; the causes are
    told and counted."""
    model = save_calling_model(tmp_path / "model")
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"{number}=", "label": number} for number in range(8)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [*FLAGS.split(), "--run-root", tmp_path, "--name", "run", "--num-rollout", "2"]
    flags += ["--hf-checkpoint", model, "--prompts", prompts]
    flags += ["--environment", f"{HERE}.faulty:run", "--rollout.environment-timeout-s", "0.3"]
    flags += ["--environment-options", '{"num_samples": 8}', "--rollout-batch-size", "8"]
    assert train.main([str(flag) for flag in flags]) == DONE
    run = RunDir.open(tmp_path / "run")
    num_wrong = {0: 0, 1: 8, 2: 8, 3: 1}
    for step, line in enumerate(run.metrics.read_text().splitlines()):
        row = json.loads(line)
        assert row["rollout/num_samples"] == 64 and row["train/grad_norm"] > 0
        assert row["rollout/dropped_sample_error"] == 2 * sum(num_wrong.values())
        groups = recorder.load(run.rollouts, step)
        assert sorted(int(group.samples[0].label) for group in groups) == list(range(8))
        for group in groups:
            wrong = [sample for sample in group.samples if sample.status is Status.ERROR]
            assert len(wrong) == num_wrong[int(group.samples[0].label) % 4]
            assert all(sample.advantage is None for sample in wrong)
    told = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert any("ConnectionError: the tool's server is gone" in text for text in told)
    assert any("longer than rollout.environment_timeout_s=0.3" in text for text in told)


def check_tokens(sample: Sample, step: int, observed: str, tokenizer) -> None:
    """Spans begin where turns of the model do, all of this step's version."""
    starts = np.flatnonzero(np.diff(sample.loss_mask.astype(int)) == 1) + 1
    assert sample.policy_versions == [(int(start), step) for start in starts]
    assert (sample.rollout_logprobs[sample.loss_mask] < 0).all()
    assert not sample.rollout_logprobs[~sample.loss_mask].any()
    tool_tokens = sample.token_ids[starts[0] :][~sample.loss_mask[starts[0] :]]
    assert re.fullmatch(observed, tokenizer.decode(tool_tokens))


def gradient_norm(path: Path, samples: list[Sample]) -> float:
    """The norm of plain PyTorch's gradient of GRPO on the policy's own samples: the mean over
    all generated tokens of -advantage * logprob."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    used = [sample for sample in samples if sample.advantage is not None]
    num_tokens = sum(sample.num_response_tokens for sample in used)
    for sample in used:
        tokens = torch.from_numpy(sample.token_ids).long()[None]
        logprobs = torch.log_softmax(model(tokens).logits[0, :-1], -1)
        chosen = logprobs.gather(1, tokens[0, 1:, None])[:, 0]
        mask = torch.from_numpy(sample.loss_mask[1:])
        loss = -sample.advantage * chosen[mask].sum() / num_tokens
        loss.backward()
    norms = [parameter.grad.norm() for parameter in model.parameters()]
    return float(torch.stack(norms).norm())
