"""A damaged checkpoint of either backend is refused by name and the one before it used,
or none at all.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanoslime import train
from nanoslime.run_dir import DONE, FAILED, RunDir
from nanoslime.storage import manifest
from tests import process_table
from tests.orchestration import test_loop
from tests.orchestration.test_loop import rows, run_dir

model = test_loop.model  # the fixture


# What engines were asked since the row before may have been in another attempt.
OF_THE_ATTEMPT = ("time/", "router/")
# On a busy machine a request may come too late for the batch of the others, and the logprobs of its
# tokens then differ in their last digits from those that it would have had there: so does what
# compares with them.
OF_THE_BATCH = (
    "train/importance_weight",
    "train/ess_ratio",
    "train/rollout_kl",
    "train/logprob_gap",
)
SAME_DIGITS = 5


def untimed(run: RunDir) -> list[dict]:
    """The rows without seconds, and without the last digits that another batch changes."""
    return [
        {
            name: round(value, SAME_DIGITS) if name.startswith(OF_THE_BATCH) else value
            for name, value in row.items()
            if not name.startswith(OF_THE_ATTEMPT)
        }
        for row in rows(run)
    ]


@pytest.fixture(
    scope="module",
    params=["fsdp", pytest.param("megatron", marks=[pytest.mark.megatron, pytest.mark.matrix])],
)
def finished(request, tmp_path_factory, model) -> RunDir:
    """Two rollouts with a checkpoint after each."""
    root = tmp_path_factory.mktemp(request.param)
    flags = ["--num-rollout", "2", "--save-interval", "1", "--backend", request.param]
    assert train.main([*run_dir(root, "run", model), *flags]) == DONE
    return RunDir.open(root / "run")


@pytest.fixture
def run(finished, tmp_path) -> RunDir:
    """A copy of it to damage."""
    shutil.copytree(finished.path, tmp_path / "run", symlinks=True)
    return RunDir.open(tmp_path / "run")


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def halve(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


# tests/storage has each damage of a directory; here are the files of a checkpoint.
DAMAGES = [
    pytest.param("trainer/*.distcp", Path.unlink, "is missing", marks=pytest.mark.matrix),
    pytest.param("trainer/*.distcp", cut, "is truncated", marks=pytest.mark.matrix),
    ("trainer/*.distcp", flip, "was altered"),
    pytest.param("trainer/.metadata", flip, "was altered", marks=pytest.mark.matrix),
    ("driver.json", flip, "was altered"),
    pytest.param("manifest.json", Path.unlink, "has no manifest.json", marks=pytest.mark.matrix),
    ("manifest.json", halve, "is not a manifest"),
]


@pytest.mark.parametrize(
    ("file", "damage", "what"), DAMAGES, ids=lambda v: getattr(v, "__name__", None)
)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(
    finished, run, caplog, file, damage, what
):
    """The second rollout is then the same again, bit for bit."""
    found = next((run.checkpoints / "step_2").glob(file))
    damage(found)
    with caplog.at_level(logging.INFO):
        assert train.main(["--resume", str(run.path)]) == DONE
    [warning] = [r.getMessage() for r in caplog.records if "refused" in r.getMessage()]
    assert warning.startswith("checkpoint step_2 is refused: ")
    assert warning.endswith("; step_1 is used instead")
    assert what in warning and found.name in warning
    assert "resumed after 1 rollouts" in caplog.text
    assert untimed(run) == untimed(finished)


def test_without_a_whole_checkpoint_a_run_does_not_begin_anew(finished, run, caplog):
    (run.checkpoints / "step_2" / "manifest.json").unlink()
    flip(next((run.checkpoints / "step_1" / "trainer").glob("*.distcp")))
    assert train.main(["--resume", str(run.path)]) == FAILED
    [error] = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    assert "step_2 is refused" in error and "step_1 is refused" in error and "was altered" in error
    assert f"empty {run.checkpoints} to begin anew" in error and "\n" not in error
    assert untimed(run) == untimed(finished) and run.status()["phase"] == "failed"


def with_other_label(prompts: Path, copy: Path) -> Path:
    lines = prompts.read_text().splitlines()
    row = json.loads(lines[0])
    row["label"] += "!"
    copy.write_text("\n".join([json.dumps(row), *lines[1:]]))
    return copy


def test_other_prompts_are_refused_and_the_configuration_stays(run, model, tmp_path, caplog):
    before = run.config.read_bytes()
    other = with_other_label(model.train, tmp_path / "other.jsonl")
    flags = ["--resume", str(run.path), "--num-rollout", "3"]
    assert train.main([*flags, "--prompts", str(other)]) == FAILED
    assert f"the prompts of {model.train}, and those of {other} are others" in caplog.text
    assert run.config.read_bytes() == before

    # The same path, but the file has changed in the meantime.
    own = shutil.copy(model.train, tmp_path / "own.jsonl")
    run.config.write_text(run.config.read_text().replace(str(model.train), str(own)))
    before = run.config.read_bytes()
    with_other_label(model.train, own)
    assert train.main(flags) == FAILED
    assert f"the prompts of {model.train} (hash " in caplog.messages[-1]
    assert f"others of {own} (hash " in caplog.messages[-1]
    assert run.config_to_resume().read_bytes() == before
    shutil.copy(model.train, own)
    assert train.main(flags) == DONE
    assert "num_rollout: 3" in run.config_to_resume().read_text()


def test_rewards_on_other_evaluation_prompts_are_not_compared(run, model, tmp_path, caplog):
    driver = run.checkpoints / "step_2" / "driver.json"
    state = json.loads(driver.read_text()) | {"best": [2.0, 1]}
    driver.write_text(json.dumps(state))
    manifest.write(driver.parent)
    flags = ["--resume", str(run.path), "--num-rollout", "3", "--checkpoint.keep-best"]
    other = with_other_label(model.held_out, tmp_path / "other.jsonl")
    assert train.main([*flags, "--eval-interval", "1", "--eval-prompts", str(other)]) == DONE
    assert sum("evaluation prompts are others" in text for text in caplog.messages) == 1
    state = json.loads((run.checkpoints / "step_3" / "driver.json").read_text())
    assert state["best"][1] == 3


def test_a_run_without_any_checkpoint_begins(run):
    shutil.rmtree(run.checkpoints)
    run.checkpoints.mkdir()
    assert train.main(["--resume", str(run.path), "--num-rollout", "1"]) == DONE
    assert [row["step"] for row in rows(run)] == [0]


@pytest.mark.parametrize(
    "backend", ["fsdp", pytest.param("megatron", marks=[pytest.mark.megatron, pytest.mark.matrix])]
)
def test_a_killed_run_resumes_exactly(tmp_path, model, backend, no_leftovers):
    """SIGKILL somewhere after the second of six checkpoints; then all metrics of an
    uninterrupted run, with a learning rate that warms up and decays, two steps a rollout,
    and an evaluation after every second.
    """
    schedule = "--training.lr-schedule cosine --training.lr-warmup-steps 3 --lr 1e-3"
    more = f"--backend {backend} --num-rollout 6 --save-interval 1 --eval-interval 2 {schedule}"
    loss = "--num-steps-per-rollout 2 --use-kl-loss --kl-loss-coef 0.01"
    flags = run_dir(tmp_path, "straight", model, f"{more} {loss}")
    assert train.main(flags) == DONE
    flags[flags.index("straight")] = "killed"
    command = [sys.executable, "-W", "ignore", "-m", "nanoslime.train", *flags]
    with (tmp_path / "log").open("w") as log:
        root = Path(train.__file__).parents[1]
        threads = os.environ | {
            "OMP_NUM_THREADS": str(torch.get_num_threads())
        }  # sums depend on it
        process = subprocess.Popen(command, cwd=root, stdout=log, stderr=log, env=threads)
        checkpoint = tmp_path / "killed" / "checkpoints" / "step_2"
        seen = process_table.wait_for(
            lambda: checkpoint.is_dir() or process.poll() is not None, 240
        )
        process.kill()
        process.wait(30)
    assert seen and process.returncode < 0, (tmp_path / "log").read_text()
    straight = RunDir.open(tmp_path / "straight")
    killed = RunDir.open(tmp_path / "killed")
    assert len(untimed(killed)) < 6
    assert train.main(["--resume", str(killed.path)]) == DONE
    assert untimed(killed) == untimed(straight)
    exported = [(run.hf(6) / "model.safetensors").read_bytes() for run in (killed, straight)]
    assert exported[0] == exported[1]
