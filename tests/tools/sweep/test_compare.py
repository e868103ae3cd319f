"""The table of settings: means and standard errors, by hand."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.checkout import ROOT
from nanoslime.config import RunConfig
from nanoslime.config.load import dump
from nanoslime.run_dir import DONE, RunDir
from tools.sweep import compare, table
from tools.watch import commands


def lines_of(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def make(root: Path, name: str, lr: float, seed: int, rewards: list[float], evals: list[float]):
    run = RunDir.create(root, name)
    config = RunConfig(name=name, seed=seed)
    config = replace(config, training=replace(config.training, lr=lr))
    run.config.write_text(dump(config))
    rows = [{"step": i, "rollout/reward_mean": reward} for i, reward in enumerate(rewards)]
    run.metrics.write_text(lines_of(rows))
    of_evals = [{"step": -1, "set": "a", "reward": 9.0}]
    for i, reward in enumerate(evals):
        of_evals.append({"step": i, "set": "a", "reward": reward})
        of_evals.append({"step": i, "set": "b", "reward": 5.0})
    run.evals.write_text(lines_of(of_evals))
    attempt = run.new_attempt()
    attempt.end(DONE, "")
    return run


@pytest.fixture
def sweep(tmp_path):
    folder = tmp_path / "runs" / "sweep"
    folder.mkdir(parents=True)
    make(folder, "s-0", 1e-3, 0, [0.1, 0.5, 0.3], [0.2, 0.4])
    make(folder, "s-1", 1e-3, 1, [0.1, 0.2, 0.5], [0.3, 0.2])
    make(folder, "s-2", 2e-3, 0, [0.7], [])
    RunDir.create(folder, "s-3").config.write_text(dump(RunConfig(name="s-3", seed=1)))
    settings = ["lr=1e-3", "lr=1e-3", "lr=2e-3", "lr=2e-3"]
    rows = tuple(table.Row(i, setting, i % 2, f"s-{i}") for i, setting in enumerate(settings))
    table.Table(folder, "sweep.yaml", rows).write()
    return folder


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_a_setting_has_the_mean_and_standard_error_of_its_seeds(sweep):
    head, first, second = compare.lines([sweep])
    assert cells(head)[:3] == ["setting", "runs", "done"]
    # Last 0.3 and 0.5: mean 0.4, deviation 0.1414, error 0.1. Best 0.5 and 0.5. Evaluated last 0.4
    # and 0.2, best 0.4 and 0.3.
    assert cells(first)[:8] == [
        "lr=1e-3",
        "2",
        "2",
        "0.4000 +- 0.1000",
        "0.5000 +- 0.0000",
        "0.3000 +- 0.1000",
        "0.3500 +- 0.0500",
        "3",
    ]
    assert cells(second)[:7] == ["lr=2e-3", "2", "1", "0.7000 (of 1)", "0.7000 (of 1)", "-", "-"]
    assert cells(second)[7] == "0 to 1"


def test_runs_without_a_sweep_are_told_apart_by_what_their_configurations_have(sweep, tmp_path):
    runs = [sweep / f"s-{i}" for i in range(3)]
    settings = [cells(line)[:2] for line in compare.lines(runs)[1:]]
    assert settings == [["training.lr=0.001", "2"], ["training.lr=0.002", "1"]]
    [_, line] = compare.lines(runs[:1])
    assert cells(line)[:2] == ["-", "1"]


def test_a_mean_says_of_how_many_runs_it_is():
    assert compare.estimate([1.0, None, 3.0]) == "2.0000 +- 1.0000 (of 2)"
    assert compare.estimate([None, 2.0, None]) == "2.0000 (of 1)"
    assert compare.estimate([2.0]) == "2.0000"
    assert compare.estimate([]) == "-"


def test_ps_and_compare_take_a_sweep_by_its_name(sweep, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for words in (["ps"], ["ps", "sweep"], ["ps", str(sweep)]):
        assert commands.main(words) == 0
        shown = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in shown] == ["s-0", "s-1", "s-2", "s-3"]
    command = [sys.executable, f"{ROOT}/jobs/runs.py", "compare", "sweep"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == compare.lines([sweep])


def test_a_run_that_was_deleted_is_none_of_its_sweep(sweep, capsys):
    shutil.rmtree(sweep / "s-1")
    # Deleted in part: whoever deletes it is not done.
    shutil.rmtree(sweep / "s-3" / "attempts")
    for words in (["ps", "--run-root", str(sweep.parent)], ["ps", str(sweep)]):
        assert commands.main(words) == 0
        shown = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in shown] == ["s-0", "s-2"]
    _, first, second = compare.lines([sweep])
    assert cells(first)[:4] == ["lr=1e-3", "1", "1", "0.3000"]
    assert cells(second)[:4] == ["lr=2e-3", "1", "1", "0.7000"]
    assert commands.main(["stop", str(sweep)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in shown] == ["s-0", "s-2"]


def test_a_sweep_without_runs_is_told_in_one_sentence(sweep, capsys):
    for index in range(4):
        shutil.rmtree(sweep / f"s-{index}")
    for name in ("ps", "compare", "stop"):
        assert commands.main([name, str(sweep)]) == 1
        assert capsys.readouterr().err.count("\n") == 1


def test_a_damaged_table_is_named(sweep, capsys):
    (sweep / table.TABLE).write_text('{"source": "a", "rows": [{"index": 0}]}')
    assert commands.main(["compare", str(sweep)]) == 0
    assert "is no table of a sweep" in capsys.readouterr().out.splitlines()[-1]
