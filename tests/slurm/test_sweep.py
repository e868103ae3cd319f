"""A sweep on a real SLURM: one array, of which each task is a run of its own."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from nanoslime.run_dir import DONE, STOPPED, RunDir
from nanoslime.types import RunError
from tests import process_table
from tests.jobs.made_run import driver, make_venv_with_fake_ray
from tests.slurm.cluster import SlurmCluster
from tools.submit import grpo as submit_grpo
from tools.submit import where
from tools.sweep import command, spec
from tools.watch import commands

pytestmark = pytest.mark.slurm
HOSTILE = 'it\'s a; echo "x" %j'
SWEEP = "name: rates\ngrid: {lr: [1e-3, 2e-3]}\nseeds: 2\n"
_DEADLINE_S = 120.0


@pytest.fixture
def slurm(
    slurm_cluster: SlurmCluster, no_leftovers: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> SlurmCluster:
    monkeypatch.setenv("SLURM_CONF", str(slurm_cluster.config_file))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return slurm_cluster


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    def tell(*argv: object) -> str:
        for answer in (tmp_path / "cache").rglob("squeue-*"):
            answer.unlink()
        capsys.readouterr()
        code = commands.main([str(word) for word in argv])
        out, err = capsys.readouterr()
        assert code == 0, out + err
        return out

    return tell


def submit(root: Path, mode: str) -> list[RunDir]:
    """The runs of a submitted sweep of four elements, two of which run at a time."""
    file = root / "sweep.yaml"
    file.write_text(SWEEP)
    venv = make_venv_with_fake_ray(root / "venv")
    flags = ["--nodes", "1", "--run-root", str(root / HOSTILE), "--cluster.venv", str(venv)]
    asked, flags = submit_grpo.parse(flags)
    sweep = spec.read(file)
    planned = command.plan(sweep, asked, flags, submits=True)
    assert command.submit(file, sweep, planned, 2, driver(mode)) == 0
    return [RunDir.open(root / HOSTILE / "rates" / f"rates-{index}") for index in range(4)]


def job_of(run: RunDir) -> str:
    return json.loads(run.job.read_text())["job_id"]


def wait_for(condition: Callable[[], object], runs: list[RunDir]) -> None:
    texts = [
        f"--- {file}\n{file.read_text(errors='replace')[-1500:]}"
        for run in runs
        for file in (*run.path.rglob("*.log"), *run.path.rglob("*.out"))
    ]
    assert process_table.wait_for(condition, _DEADLINE_S), "\n".join(texts)


def test_elements_of_an_array_are_watched_requeued_and_stopped_each_for_itself(
    slurm: SlurmCluster, tmp_path: Path, told: Callable[..., str]
) -> None:
    runs = submit(tmp_path, "until-stop")
    first, second, third, fourth = runs
    began = [run.attempts / "1" / "driver_began" for run in runs]
    wait_for(lambda: began[0].exists() and began[1].exists(), runs)
    array = job_of(first).partition("_")[0]
    assert [job_of(run) for run in runs] == [f"{array}_{index}" for index in range(4)]
    assert not third.latest_attempt() and not fourth.latest_attempt()
    page = told("ps", first.path.parent).splitlines()
    assert ["running" in line for line in page] == [True, True, False, False]
    assert "PENDING (JobArrayTaskLimit)" in page[2] and "PENDING" in page[3]
    heads = {json.loads(run.attempt(1).head.read_text())["ray_address"] for run in (first, second)}
    tokens = {run.attempt(1).ray_token.read_text() for run in (first, second)}
    assert len(heads) == len(tokens) == 2
    with pytest.raises(RunError, match=f"job {array}_3 still holds"):
        where.refuse_if_job_lives(fourth)

    # What SLURM sends ahead of the time limit: this element goes on, and no other one is touched.
    # SLURM 22.05 tells scancel of an array's task that it cannot, which then asks again and again.
    with suppress(TimeoutError):
        slurm.run("scancel", "--signal=USR2", job_of(first), timeout_s=3.0)
    # Its place is taken by the next element, until others end.
    wait_for(began[2].exists, runs)
    assert second.attempt(1).ended() is None
    for run in (second, third):
        told("stop", run.path)
        code, reason = run.attempt(1).ended() or (None, "")
        assert code == STOPPED and reason.endswith("asked by runs.py stop")
    wait_for(lambda: len(first.all_attempts()) == 2 and first.attempt(2).ended(), runs)
    assert first.attempt(2).ended() == (DONE, "")
    assert first.attempt(1).key == f"{array}_0-0" and first.attempt(2).key == f"{array}_0-1"

    queue = ["squeue", "--noheader", "--array", "--format=%i"]
    wait_for(lambda: job_of(first) not in slurm.run(*queue).stdout.split(), runs)
    wait_for(began[3].exists, runs)
    text = told("stop", first.path.parent)
    assert "rates-3: attempt 1: stopped" in text and "does not run: stopped" in text
    assert "rates-0: " in text and "does not run: done" in text
    wait_for(lambda: not slurm.run("squeue", "--noheader").stdout, runs)
    assert [len(run.all_attempts()) for run in runs] == [2, 1, 1, 1]
