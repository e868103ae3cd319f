"""A damaged file of one run hides no other run, and is named."""

import json

import pytest

from nanoslime.run_dir import RunDir
from nanoslime.types import RunError
from tests.tools.watch.watched import write_phases
from tools.sweep import command, compare, table

WRONG_PHASES = json.dumps({"phase": "train", "step": 1, "time": "noon"})
DAMAGES = [
    ("attempts/1/phases.jsonl", f"{WRONG_PHASES}\n{WRONG_PHASES}\n"),
    ("attempts/1/attempt.json", '{"key": "1-0", "started": {}, "host": 3, "pid": "x"}'),
    ("attempts/1/end.json", '{"code": [1], "time": "later"}'),
    ("metrics.jsonl", '{"step": "x", "rollout/reward_mean": "high", "time/step_s": [1]}'),
    ("evals.jsonl", '{"step": 0, "reward": {"a": 1}}'),
]
NO_JSON = b"\x00\xff{"


@pytest.fixture
def sweep(tmp_path):
    """A sweep of three runs, in a run root that has another run."""
    folder = tmp_path / "runs" / "sweep"
    folder.mkdir(parents=True)
    for root, name in ((folder, "s-0"), (folder, "s-1"), (folder, "s-2"), (folder.parent, "other")):
        write_phases(RunDir.create(root, name), ("generate", 0, 100.0), ("done", 1, 130.0))
    rows = tuple(table.Row(i, f"lr={i}", 0, f"s-{i}") for i in range(3))
    table.Table(folder, "/a/sweep.yaml", rows).write()
    return folder


@pytest.mark.parametrize("content", [NO_JSON, b"[]", b'{"source": 1, "rows": [{"index": "x"}]}'])
def test_a_damaged_table_of_a_sweep_hides_no_run(sweep, told, content):
    (sweep / "sweep.json").write_bytes(content)
    lines = told("ps", "--run-root", sweep.parent).splitlines()
    assert [line.split()[0] for line in lines] == ["sweep", "other", "s-0", "s-1", "s-2"]
    assert str(sweep / "sweep.json") in lines[0] and "shown all the same" in lines[0]
    assert all("done" in line for line in lines[1:])
    rows = told("compare", sweep).splitlines()
    assert len(rows) == 3 and rows[2].startswith("told by their configurations, since")


def test_another_sweep_is_found_beside_a_damaged_one(sweep):
    damaged = sweep.parent / "damaged"
    damaged.mkdir()
    (damaged / "sweep.json").write_bytes(NO_JSON)
    options = ["--local", "--run-root", str(sweep.parent)]
    source = command.Path("/a/sweep.yaml")
    assert command._latest(source, options, {}) == sweep
    with pytest.raises(RunError, match=f"has no sweep in .*{damaged}/sweep.json is still not JSON"):
        command._latest(source.with_name("b.yaml"), options, {})


@pytest.mark.parametrize(("file", "content"), DAMAGES)
def test_a_damaged_file_of_a_run_hides_no_other_one(sweep, told, refused, file, content):
    run = sweep / "s-1"
    (run / file).write_text(content)
    lines = told("ps", sweep).splitlines()
    assert [line.split()[0] for line in lines] == ["s-0", "s-1", "s-2"]
    assert "done" in lines[0] and "done" in lines[2]
    assert f"{run}: one of its files is damaged" in lines[1] or "done" in lines[1]
    if "damaged" in lines[1]:
        assert refused("status", run).count("\n") == 1


@pytest.mark.parametrize(("file", "content"), DAMAGES)
def test_a_comparison_leaves_out_what_is_damaged_and_says_so(sweep, file, content):
    whole = compare.lines([sweep])
    (sweep / "s-1" / file).write_text(content)
    lines = compare.lines([sweep])
    assert len(lines) == len(whole)
    assert {lines[1][:4], lines[2][:4]} <= {"lr=0", "lr=1", "lr=2"}
    if len(lines) - 1 > 3 or lines[-1].startswith("left out"):
        assert f"{sweep / 's-1'}: one of its files is damaged" in lines[-1]


@pytest.mark.parametrize(("file", "content"), DAMAGES[:2])
def test_a_sweep_with_a_damaged_run_is_stopped_all_the_same(sweep, told, file, content):
    (sweep / "s-1" / file).write_text(content)
    lines = told("stop", sweep).splitlines()
    assert [line[:5] for line in lines if "does not run: done" in line] == ["s-0: ", "s-2: "]
    assert any(line.startswith("s-1: ") and "damaged" in line for line in lines)
