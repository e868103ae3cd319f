"""Half a run: training on recorded rollouts without an engine, and rollouts without a
trainer.
"""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nanoslime import train
from nanoslime.rollout import recorder
from nanoslime.run_dir import DONE, FAILED, RunDir
from tests.orchestration import test_loop
from tests.orchestration.test_loop import rows, run_dir

model = test_loop.model  # the fixture
KL = "--use-kl-loss --kl-loss-coef 0.01 --num-steps-per-rollout 2 --lr 1e-3"


# What engines and rewards count, and evaluations; a replay has none of them.
NOT_REPLAYED = (
    "time/",
    "eval/",
    "router/",
    "engines/",
    "weight_sync/",
    "rollout/generated_",
    "rollout/reward_",
)


def untimed(run: RunDir) -> list[dict]:
    """The rows without what no replay has, but with the rewards."""
    return [
        {
            name: value
            for name, value in row.items()
            if not name.startswith(NOT_REPLAYED)
            or name in ("rollout/reward_mean", "rollout/reward_std")
        }
        for row in rows(run)
    ]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, model) -> RunDir:
    """Three rollouts of a whole run with the embedded engine."""
    root = tmp_path_factory.mktemp("recorded")
    assert train.main([*run_dir(root, "whole", model), "--num-rollout", "3", *KL.split()]) == DONE
    return RunDir.open(root / "whole")


@pytest.fixture
def bare(tmp_path, model) -> Path:
    """The model's weights and config.json: no tokenizer."""
    directory = tmp_path / "bare"
    directory.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy2(model.model / name, directory)
    return directory


def replay(root: Path, bare: Path, directory: Path, more: str = "") -> list[str]:
    files = f"--hf-checkpoint {bare} --load-rollouts {directory} --run-root {root} --name replayed"
    shape = "--rollout-batch-size 4 --n-samples-per-prompt 4 --no-use-tensorboard"
    return ["--mock", "--rehearsal.no-enabled", *f"{files} {shape} {KL} {more}".split()]


def test_a_replay_is_the_run_it_was_recorded_from(tmp_path, recorded, bare, caplog):
    """Losses, norms and all other metrics bit for bit, and the weights at the end;
    neither tokenizer, prompts nor engine are there.
    """
    assert train.main(replay(tmp_path, bare, recorded.path, "--num-rollout 3")) == DONE
    run = RunDir.open(tmp_path / "replayed")
    assert untimed(run) == untimed(recorded)
    exported = [(r.hf(3) / "model.safetensors").read_bytes() for r in (run, recorded)]
    assert exported[0] == exported[1]
    assert not run.evals.exists() and not list(run.rollouts.iterdir())
    assert "evaluations are skipped" not in caplog.text  # none were asked for


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("--temperature 0.5", "rollout.temperature=1.0, not 0.5"),
        ("--max-new-tokens 9 --algorithm.denominator fixed", "rollout.max_new_tokens=8, not 9"),
        ("--max-new-tokens 9 --algorithm.overlong-buffer 2", "rollout.max_new_tokens=8, not 9"),
        ("--max-new-tokens 9", ""),
    ],
)
def test_a_replay_with_other_settings_of_sampling_is_refused(
    tmp_path, recorded, bare, caplog, more, says
):
    code = train.main(replay(tmp_path, bare, recorded.path, f"--num-rollout 1 {more}"))
    errors = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    if says:
        [error] = errors
        assert code == FAILED and says in error
    else:
        assert code == DONE and not errors


def test_a_replay_resumes(tmp_path, recorded, bare):
    assert train.main(replay(tmp_path, bare, recorded.rollouts, "--num-rollout 2")) == DONE
    run = RunDir.open(tmp_path / "replayed")
    assert train.main(["--resume", str(run.path), "--num-rollout", "3"]) == DONE
    assert untimed(run) == untimed(recorded)


def test_evaluation_is_skipped_saying_so_once(tmp_path, recorded, bare, model, caplog):
    more = f"--num-rollout 2 --eval-prompts {model.held_out} --eval-interval 1"
    assert train.main(replay(tmp_path, bare, recorded.rollouts, more)) == DONE
    messages = [record.getMessage() for record in caplog.records]
    [skipped] = [message for message in messages if "evaluations are skipped" in message]
    assert skipped == "rollout.load_rollouts: there is no engine, so evaluations are skipped"


@pytest.mark.parametrize("name", ["rollouts", "empty", "nowhere"])
def test_too_few_recorded_rollouts_are_refused_at_the_start(tmp_path, recorded, bare, caplog, name):
    (tmp_path / "empty").mkdir()
    directory = recorded.rollouts if name == "rollouts" else tmp_path / name
    found = 3 if name == "rollouts" else 0
    assert train.main(replay(tmp_path, bare, directory, "--num-rollout 9")) == FAILED
    [error] = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    assert f"{name}' holds {found} rollouts" in error and "rollout.num_rollout=9" in error
    assert not (tmp_path / "replayed").exists()


def test_rollout_only_records_what_the_checkpoint_samples_and_can_be_trained_on(
    tmp_path, model, bare
):
    """Without a trainer: neither backend is imported. All samples are of version 0, which
    a replay takes.
    """
    flags = run_dir(tmp_path, "half", model, "--rollout-only --num-rollout 2 --backend megatron")
    code = f"""
import sys
from nanoslime import train
code = train.main({flags!r})
loaded = [m for m in sys.modules if m.startswith("megatron") or m == "nanoslime.training.fsdp"]
sys.exit(f"{{code}} {{loaded}}" if code or loaded else 0)
"""
    root = Path(train.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    run = RunDir.open(tmp_path / "half")
    assert [row["rollout/num_samples"] for row in rows(run)] == [16, 16]
    assert not any(name.startswith("train/") for row in rows(run) for name in row)
    assert not (run.path / "hf").exists()
    summary = json.loads(run.summary.read_text())
    assert 0 < summary["reward_before"] < 1 and summary["hf_export"] is None
    groups = recorder.load(run.rollouts, 1)
    assert {v for g in groups for s in g.samples for _, v in s.policy_versions} == {0}

    on_policy = "--num-rollout 2 --num-steps-per-rollout 1"  # in the first of the rollouts
    assert train.main(replay(tmp_path, bare, run.path, on_policy)) == DONE
    gaps = [row["train/logprob_gap_max"] for row in rows(RunDir.open(tmp_path / "replayed"))]
    assert gaps[0] < 1e-4 < gaps[1], "the second is off-policy"


def test_rollout_only_resumes_at_its_place_in_the_prompts(tmp_path, model):
    for name, first in (("straight", 3), ("halted", 1)):
        flags = run_dir(tmp_path, name, model, f"--rollout-only --num-rollout {first}")
        assert train.main(flags) == DONE
    straight = RunDir.open(tmp_path / "straight")
    halted = RunDir.open(tmp_path / "halted")
    assert train.main(["--resume", str(halted.path), "--num-rollout", "3"]) == DONE
    for step in range(3):
        name = f"step_{step}-0.jsonl"
        assert (halted.rollouts / name).read_bytes() == (straight.rollouts / name).read_bytes()


def test_a_run_that_trained_on_files_has_no_data_cursor_to_go_on_from(
    tmp_path, recorded, model, caplog
):
    assert train.main(replay(tmp_path, model.model, recorded.rollouts, "--num-rollout 1")) == DONE
    path = tmp_path / "replayed"
    flags = ["--resume", path, "--load-rollouts=", "--prompts", model.train, "--num-rollout", "2"]
    assert train.main([str(flag) for flag in flags]) == FAILED
    assert "which has no data cursor" in caplog.text


def test_torchrun_has_no_ranks_without_a_trainer(tmp_path, model, caplog, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert train.main([*run_dir(tmp_path, "ranks", model), "--rollout-only"]) == FAILED
    assert "rollout.rollout_only has no trainer ranks; start it without torchrun" in caplog.text
