"""What a run's directory proves, and what it does not: each check can fail."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nanoslime.config.load import dump, read
from nanoslime.run_dir import DONE, FAILED, RunDir
from nanoslime.storage import manifest
from tests.jobs.made_run import make_run
from tools.acceptance import checks, places

ROW = {
    "train/logprob_gap_mean": 2e-7,
    "train/logprob_gap_max": 3e-6,
    "weight_sync/logprob_gap_mean": 4e-7,
    "engines/lost": 0.0,
}


def write_rows(run: RunDir, **changes: object) -> None:
    rows = [{"step": step, **ROW} for step in range(3)]
    rows[-1] |= changes
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Three steps; the driver was killed in the second one, and the second attempt ended."""
    made = make_run(tmp_path, 1)
    run = made.run
    config = read(run.config)
    config = replace(
        config,
        rollout=replace(config.rollout, num_rollout=3),
        weight_sync=replace(config.weight_sync, compare_every=1),
        model=replace(config.model, dtype="float32"),
    )
    run.config.write_text(dump(config))
    write_rows(run)
    run.new_attempt("7-0").end(FAILED, "the driver was killed by SIGKILL", can_go_on=True)
    checkpoint = run.checkpoint(1)
    checkpoint.mkdir()
    (checkpoint / "weights").write_bytes(b"1234")
    manifest.write(checkpoint)
    places.folder(run).mkdir()
    killed = {"committed": 1, "phase": "generate", "time": 0.0}
    (places.folder(run) / places.KILLED).write_text(json.dumps(killed))
    (places.folder(run) / "memory-2.json").write_text('{"peak_bytes": 1000000000}')
    run.new_attempt("7-1").end(DONE, "")
    return run


def failed(run: RunDir) -> list[str]:
    return [one.name for one in checks.of_run(run) if one.outcome == checks.FAILED_CHECK]


def test_a_good_run_passes_and_says_what_it_cannot_judge(run):
    found = checks.of_run(run)
    assert checks.passed(found)
    assert {one.name: one.outcome for one in found} == {
        "steps": "passed",
        "parity": "passed",
        "sync": "passed",
        "save": "passed",
        "kill and resume": "passed",
        "bandwidth": "not judged",
        "memory": "not judged",
    }


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"train/logprob_gap_mean": 2e-4}, ["parity"]),
        ({"train/logprob_gap_max": 0.02}, ["parity"]),
        ({"train/logprob_gap_max": float("nan")}, ["parity"]),
        ({"weight_sync/logprob_gap_mean": 0.02}, ["sync"]),
        ({"engines/lost": 1.0}, ["sync"]),
        ({"step": 1}, ["steps"]),
    ],
)
def test_figures_beyond_their_bounds_fail(run, changes, names):
    write_rows(run, **changes)
    assert failed(run) == names


def test_a_run_that_proves_nothing_fails_all_that_it_must_show(tmp_path):
    bare = make_run(tmp_path, 1).run
    assert failed(bare) == ["steps", "parity", "sync", "save", "kill and resume"]


def test_a_damaged_checkpoint_fails(run):
    (run.checkpoint(1) / "weights").write_bytes(b"1235")
    assert failed(run) == ["save"]


def test_a_resumption_from_another_step_fails(run):
    killed = {"committed": 2, "phase": "generate", "time": 0.0}
    (places.folder(run) / places.KILLED).write_text(json.dumps(killed))
    assert failed(run) == ["kill and resume"]


def test_the_bandwidth_of_a_preflight_table_is_told(run):
    table = {"nodes": {"n1": {"allreduce_gb_s": 1.5, "cores": 2}}}
    (run.attempt(2).path / "preflight.json").write_text(json.dumps(table))
    [found] = [one for one in checks.of_run(run) if one.name == "bandwidth"]
    assert (found.outcome, found.text) == ("passed", "allreduce 1.5 GB/s")
