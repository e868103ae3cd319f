"""What a run's directory proves, and what it does not: each check can fail."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.checkout import environment, module_command
from nanoslime.config.load import dump, read
from nanoslime.processes.ports import free_port
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


def bandwidth(run: RunDir, **cluster: object) -> checks.Check:
    config = read(run.config)
    changes = {"nodes": 2, "measure_links": True, **cluster}
    run.config.write_text(dump(replace(config, cluster=replace(config.cluster, **changes))))
    [found] = [one for one in checks.of_run(run) if one.name == "bandwidth"]
    return found


def links(*gbps: float, problem: str = "") -> dict[str, Any]:
    """What node 0 of two writes (tools/links.py)."""
    readings = {
        "n1": {"check": "links", "value": "1 GB/s or more", "problem": ""},
        "n2": {"check": "links", "value": "unfit" if problem else "1 GB/s or more"},
    }
    readings["n2"]["problem"] = problem
    return {
        "all_reduce_gbps": 0.8034330449416949,
        "links": [{"source": 0, "target": 1, "gbps": one} for one in gbps],
        "nics": [{"interface": "lo", "network": "", "adapters": "", "hcas": []}] * 2,
        "readings": readings,
    }


def test_the_bandwidth_that_nodes_have_measured_is_told(run):
    (run.attempt(2).path / "links.result.json").write_text(json.dumps(links(1.5966, 2.4228)))
    found = bandwidth(run)
    text = "links give 1.6 to 2.42 GB/s, and an all-reduce 0.803 GB/s"
    assert (found.outcome, found.text) == ("passed", text)
    assert found.values == {
        "min_gbps": 1.5966,
        "max_gbps": 2.4228,
        "all_reduce_gbps": 0.8034330449416949,
    }


def test_a_link_slower_than_the_site_expects_fails(run):
    slow = links(1.5, 9.0, problem="n2 exchanges 1.5 GB/s with n1")
    (run.attempt(1).path / "links.result.json").write_text(json.dumps(slow))
    found = bandwidth(run, expected_gbps=10.0)
    assert found.outcome == "failed"
    assert found.text.endswith("(bound of a link 5); n2 exchanges 1.5 GB/s with n1")
    good = links(6.0, 9.0)
    (run.attempt(2).path / "links.result.json").write_text(json.dumps(good))
    assert bandwidth(run, expected_gbps=10.0).outcome == "passed"


def test_nodes_that_should_have_measured_their_links_and_have_not_fail(run):
    assert bandwidth(run).outcome == "failed"
    assert bandwidth(run, measure_links=False).outcome == "not judged"
    assert bandwidth(run, nodes=1).outcome == "not judged"


@pytest.mark.matrix
def test_the_bandwidth_of_two_processes_is_read_as_they_write_it(run):
    attempt = run.attempt(2).path
    task = {
        "names": ["n1", "n2"],
        "addresses": ["127.0.0.1"] * 2,
        "port": free_port("127.0.0.1"),
        "device": "cpu",
        "trainer": 0,
        "engines": [1],
        "expected_gbps": None,
    }
    (attempt / "links.json").write_text(json.dumps(task))
    command = [*module_command(sys.executable, "tools.links"), str(attempt)]
    nodes = [subprocess.Popen([*command, node], env=environment()) for node in "01"]
    assert [node.wait(120) for node in nodes] == [0, 0]
    found = bandwidth(run)
    assert found.outcome == "passed"
    assert 0 < found.values["min_gbps"] <= found.values["max_gbps"]
    assert found.values["all_reduce_gbps"] > 0
