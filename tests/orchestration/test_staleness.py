"""Rollouts beside training, for real in one process: the embedded engine and FSDP."""

import json

import pytest

from nanoslime import train
from nanoslime.orchestration.launch import parse
from nanoslime.orchestration.rollout_manager import RolloutManager
from nanoslime.rollout import recorder
from nanoslime.run_dir import DONE, STOPPED, RunDir
from tests.orchestration import test_loop
from tests.orchestration.test_loop import rows, run_dir

model = test_loop.model  # the fixture
NUM_ROLLOUT = 6
BATCH = 4


def trained_prompts(run: RunDir, max_staleness: int) -> dict[int, int]:
    """The prompt of each group that was trained on, once; no token is beyond the bound."""
    found: dict[int, int] = {}
    for step in range(NUM_ROLLOUT):
        groups = recorder.load(run.rollouts, step)
        assert len(groups) == BATCH
        for group in groups:
            assert group.group_id not in found, "a prompt was trained on twice"
            found[group.group_id] = group.samples[0].metadata["prompt_id"]
            for sample in group.samples:
                for _, version in sample.policy_versions:
                    assert step - max_staleness <= version <= step
    return found


@pytest.mark.parametrize("max_staleness", [1, 2])
def test_a_stopped_run_goes_on_with_what_was_being_sampled(
    tmp_path, model, monkeypatch, max_staleness
):
    """Every prompt is trained on once, in the order of a run that takes turns."""
    settings = f"--num-rollout {NUM_ROLLOUT} --backend fsdp --algorithm.filter-zero-std=false"
    in_turn = run_dir(tmp_path, "in_turn", model, settings)
    assert train.main(in_turn) == DONE
    expected = trained_prompts(RunDir.open(tmp_path / "in_turn"), 0)

    launch = parse(run_dir(tmp_path, "run", model, f"{settings} --max-staleness {max_staleness}"))
    generate = RolloutManager.generate

    def stopping(self, step):
        groups = generate(self, step)
        if step == 2:
            launch.attempt.request_stop("a test asked")
        return groups

    monkeypatch.setattr(RolloutManager, "generate", stopping)
    assert train.run(launch) == STOPPED
    monkeypatch.undo()
    run = RunDir.open(tmp_path / "run")
    saved = run.checkpoint(3)
    held = json.loads((saved / "driver.json").read_text())["rollout"]["producer"]["admission"]
    assert len(held["oldest"]) == (max_staleness + 1) * BATCH and (saved / "rollout").is_dir()

    assert train.main(["--resume", str(run.path)]) == DONE
    assert trained_prompts(run, max_staleness) == expected
    ages = [row["rollout/staleness_max"] for row in rows(run)]
    assert 0 < max(ages) <= max_staleness
