"""A checkpoint that is evaluated later gets what the run found while it trained."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanoslime.config.load import read
from nanoslime.run_dir import DONE, FAILED
from tests.orchestration import wired
from tools import evaluate

ROOT = Path(__file__).parents[2]
REWARD = "tests.orchestration.rewards:by_text_where_labelled"


def changes(files: wired.Files, **more: Any) -> dict[str, Any]:
    greedy = {"name": "greedy", "prompts": str(files.held_out), "temperature": 0}
    return {"eval.sets": [greedy], "eval.interval": 1, "checkpoint.interval": 1, **more}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> wired.Files:
    return wired.make_files(tmp_path_factory.mktemp("wired"))


@pytest.fixture(scope="module")
def seen(tmp_path_factory, files) -> wired.Seen:
    return wired.run(files, tmp_path_factory.mktemp("run"), changes(files))


def evaluated(root: Path, *words: object) -> list[dict[str, Any]]:
    """The rows that the command writes."""
    output = root / "found.json"
    more = ["--run-root", root, "--output", output]
    assert evaluate.main([str(word) for word in (*words, *more)]) == DONE
    return json.loads(output.read_text())["sets"]


def of_step(seen: wired.Seen, step: int) -> list[dict[str, Any]]:
    """The rows of all sets: one is sampled by the seeds of the step, one is greedy."""
    rows = [row for row in seen.evals if row["step"] == step]
    assert [row["set"] for row in rows] == ["held_out", "greedy"]
    return rows


def test_a_model_is_evaluated_by_a_recipe(tmp_path, seen, files):
    """As the run found it before its first rollout."""
    recipe = tmp_path / "recipe.yaml"
    settings = wired.settings(files, changes(files))
    settings["data"]["prompts"] = settings["model"]["hf_checkpoint"] = ""
    recipe.write_text(json.dumps(settings))
    assert evaluated(tmp_path, files.model, recipe) == of_step(seen, -1)
    [written] = tmp_path.glob("*/config.yaml")
    assert [one.title for one in read(written).eval_sets] == ["held_out", "greedy"]


def test_a_run_is_evaluated_at_its_newest_export(tmp_path, seen, capsys):
    assert evaluated(tmp_path, seen.run.path) == of_step(seen, 1)
    shown = capsys.readouterr().out.splitlines()
    row = of_step(seen, 1)[1]
    estimate = f"greedy               mean@1     {row['reward']:.4f} ± {row['mean@1_se']:.4f}"
    assert estimate in shown and str(tmp_path / "found.json") in shown[-1]
    assert seen.run.evals.read_text().count("\n") == 6  # of the run itself alone


def test_a_step_of_the_trainer_is_exported_and_evaluated(tmp_path, seen):
    checkpoint = seen.run.checkpoint(1)
    assert evaluated(tmp_path, checkpoint) == of_step(seen, 0)
    assert of_step(seen, 0) != of_step(seen, 1)
    exported = seen.run.hf(1)
    assert evaluated(tmp_path, exported) == of_step(seen, 0)


@pytest.mark.megatron
def test_a_step_of_megatron_is_exported_and_evaluated(tmp_path, files):
    megatron = wired.run(files, tmp_path, changes(files, **{"training.backend": "megatron"}))
    assert evaluated(tmp_path, megatron.run.checkpoint(1)) == of_step(megatron, 0)


def test_flags_change_what_is_evaluated(tmp_path, seen, files):
    one = json.dumps({"name": "two", "prompts": str(files.held_out), "n_samples_per_prompt": 2})
    flags = [
        "--eval.sets",
        one,
        "--eval-prompts",
        "",
        "--eval.max-prompts",
        "3",
        "--reward",
        REWARD,
    ]
    [row] = evaluated(tmp_path, seen.run.path, *flags)
    assert (row["set"], row["samples"], row["prompts"]) == ("two", 6, 3)
    assert "pass@2" in row


@pytest.mark.sglang
def test_sglang_finds_what_the_embedded_engine_finds(
    tmp_path, tiny_model, sglang_engine, monkeypatch
):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "p{i}", "label": 1}}\n' for i in range(5)))
    flags = ["--eval-prompts", prompts, "--eval.temperature", "0", "--max-new-tokens", "6"]
    flags += ["--reward", REWARD, "--dtype", "float32"]
    embedded = evaluated(tmp_path, tiny_model, *flags, "--engine", "embedded")
    monkeypatch.setattr(evaluate.EngineHere, "start", lambda _: sglang_engine)
    assert evaluated(tmp_path, tiny_model, *flags, "--engine", "sglang") == embedded
    assert embedded[0]["response_tokens_mean"] == 6


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["RUN", "--eval-prompts", "", "--eval.sets={}"], "eval.sets.0.prompts"),
        (["MODEL"], "there is nothing to evaluate on: give --eval-prompts FILE, or eval.sets in"),
        (["MODEL", "--nonsense", "1"], "unknown flag --nonsense"),
        (["nowhere/at/all", "--eval-prompts", "HELD_OUT"], "is neither a directory nor a hub id"),
        (["EMPTY"], "has no checkpoint yet, neither in hf/ nor in checkpoints/"),
        (["DAMAGED"], "is missing; manifest.json lists it"),
        (["MODEL", "--eval-prompts", "HELD_OUT", "--reward", "no.such:f"], "cannot load no.such"),
    ],
)
def test_what_cannot_be_evaluated_is_said_in_one_line(tmp_path, seen, files, words, says, caplog):
    empty, damaged = tmp_path / "empty", tmp_path / "damaged"
    for copy in (empty, damaged):
        shutil.copytree(seen.run.path, copy)
        shutil.rmtree(copy / "hf")
    shutil.rmtree(empty / "checkpoints")
    next((damaged / "checkpoints" / "step_2" / "trainer").glob("*.distcp")).unlink()
    places = {
        "RUN": seen.run.path,
        "MODEL": files.model,
        "HELD_OUT": files.held_out,
        "EMPTY": empty,
        "DAMAGED": damaged,
    }
    given = [str(places.get(word, word)) for word in words]
    caplog.clear()
    assert evaluate.main([*given, "--run-root", str(tmp_path / "runs")]) == FAILED
    [line] = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert says in line and "\n" not in line


def test_the_command_of_the_readme_is_this_one():
    command = [sys.executable, "-m", "nanoslime.evaluate", "nowhere/at/all"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == FAILED
    assert ended.stderr.startswith("there is nothing to evaluate on: give --eval-prompts FILE")
