"""The ladder: each rung only where the one below it passed."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import submission
from jobs.checkout import ROOT
from nanoslime.config import ClusterConfig, RunConfig
from nanoslime.run_dir import DONE, FAILED, RunDir
from nanoslime.types import RunError
from tests.jobs.made_run import make_run
from tools.acceptance import checks, command, ladder
from tools.acceptance.checks import Check
from tools.submit import grpo as submit_grpo
from tools.submit import local


@pytest.fixture
def climbed(tmp_path, monkeypatch):
    """What becomes of the rungs where those of these names fail; nothing is run."""

    def climb(fails=(), max_nodes=None, kept=lambda report: None):
        flags = ["--run-root", str(tmp_path / "runs")]
        asked, flags = submit_grpo.parse(flags)
        site = ladder.Site(asked, flags, submits=False, max_nodes=max_nodes, patience_s=1.0)
        monkeypatch.setattr(local, "run_local", lambda *arguments: 0)

        def of_run(run):
            is_bad = run.name.removeprefix("acceptance-") in fails
            return [Check("steps", checks.FAILED_CHECK if is_bad else checks.PASSED, "told")]

        monkeypatch.setattr(checks, "of_run", of_run)
        report = ladder.climb(site, lambda text: None, kept)
        return [(one.rung.name, one.state) for one in report.outcomes]

    return climb


NAMES = ["one-slot", "node-fsdp", "node-megatron", "node-colocated", "two-nodes", "four-nodes"]


def test_all_rungs_are_tried_from_the_lowest_on(climbed):
    assert climbed() == [(name, "passed") for name in NAMES]


def test_above_a_failed_rung_nothing_is_tried(climbed):
    states = ["passed", "passed", "failed", "not reached", "not reached", "not reached"]
    assert climbed(fails=["node-megatron"]) == list(zip(NAMES, states, strict=True))


def test_a_site_with_too_few_nodes_ends_the_ladder_early(climbed):
    states = ["passed"] * 5 + ["impossible"]
    assert climbed(max_nodes=2) == list(zip(NAMES, states, strict=True))


def test_after_each_rung_the_report_says_how_far_it_is(climbed):
    told = []

    def kept(report):
        states = [rung["state"] for rung in report.content()["rungs"]]
        told.append((report.verdict(), states.count("not reached")))

    climbed(kept=kept)
    assert told[0] == ("passed 1 rungs so far; the next one is one node: FSDP2", 5)
    assert told[-1] == ("passed all 6 rungs", 0)
    assert [number for _, number in told] == [5, 4, 3, 2, 1, 0]


def test_an_interrupted_ladder_leaves_the_report_of_its_rungs(tmp_path, monkeypatch):
    begun = []

    def run_local(config, *arguments):
        begun.append(config.name)
        if len(begun) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(local, "run_local", run_local)
    monkeypatch.setattr(checks, "of_run", lambda run: [Check("steps", checks.PASSED, "3 of 3")])
    words = ["--local", "--run-root", str(tmp_path / "runs"), "--report", str(tmp_path / "report")]
    assert command.main(words) == 130
    content = json.loads((tmp_path / "report" / "acceptance.json").read_text())
    states = [rung["state"] for rung in content["rungs"]]
    assert states == ["passed", *["not reached"] * 5]
    assert "so far" in (tmp_path / "report" / "acceptance.txt").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_lost_terminal_ends_the_ladder_as_ctrl_c_does(number):
    code = (
        "import signal, time\n"
        "from tools.acceptance.ladder import interrupt_by_signals\n"
        "interrupt_by_signals()\n"
        "try:\n"
        f"    signal.raise_signal({int(number)})\n"
        "    time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
    )
    for of_int in ("--default-signal=INT", "--ignore-signal=INT"):
        begin = ["env", "--default-signal=HUP", of_int, sys.executable, "-c", code]
        done = subprocess.run(begin, capture_output=True, text=True, cwd=ROOT)
        assert done.stdout == "interrupted\n"
    nohup = ["nohup", sys.executable, "-c", code.replace("time.sleep(60)", "print('goes on')")]
    if number == signal.SIGHUP:
        done = subprocess.run(nohup, capture_output=True, text=True, cwd=ROOT)
        assert done.stdout == "goes on\n"


@pytest.mark.parametrize(
    ("cluster", "python"),
    [
        ({"venv": "/site/venv"}, "/site/venv/bin/python"),
        ({"conda": "rl"}, "python"),
        ({"container": "pyxis", "container_image": "/i.sqsh"}, "python"),
        ({}, sys.executable),
    ],
)
def test_the_driver_has_the_python_of_the_agents_and_their_code(cluster, python):
    config = RunConfig(name="x", cluster=ClusterConfig(**cluster))
    command = ladder.driver_command(config, submits=True)
    assert shlex.split(command) == [python, "-P", "-m", "tools.acceptance.driver"]
    here = ladder.driver_command(config, submits=False)
    assert shlex.split(here) == [sys.executable, "-P", "-m", "tools.acceptance.driver"]


SILENT = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
UNKNOWN = "slurm_load_jobs error: Invalid job id specified"


class Slurm:
    """Stand-ins for SLURM's programs: scontrol tells one state after the other, then the last one
    for ever.
    """

    def __init__(self, root: Path, run: RunDir) -> None:
        self.run = run
        self.root = root
        self.told: list[str] = []
        (root / "bin").mkdir()
        (root / "count").write_text("0")
        self._write(
            "scontrol",
            f"n=$(($(cat {root}/count) + 1)); echo $n > {root}/count",
            f'line=$(sed -n "${{n}}p" {root}/states)',
            f'test -n "$line" || line=$(tail -n 1 {root}/states)',
            'test "$line" != silent || exit 1',
            'echo "JobId=7 JobState=$line"',
        )
        self._write("scancel", f"echo $1 > {root}/cancelled")

    def _write(self, name: str, *lines: str) -> None:
        file = self.root / "bin" / name
        file.write_text("\n".join(["#!/bin/sh", *lines, ""]))
        file.chmod(0o755)

    def wait(self, *states: str, squeue: str = SILENT, patience_s: float = 5.0) -> None:
        (self.root / "states").write_text("".join(f"{state}\n" for state in states))
        code = 1 if squeue else 0
        self._write("squeue", f"echo '{squeue}' >&2", f"exit {code}")
        ladder._wait(self.run, patience_s, self.told.append)

    @property
    def num_looks(self) -> int:
        return int((self.root / "count").read_text())

    @property
    def is_cancelled(self) -> bool:
        return (self.root / "cancelled").exists()


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    run = make_run(tmp_path / "runs", 1).run
    submission.record_job(run, "7")
    made = Slurm(tmp_path, run)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(ladder, "_LOOK_S", 0.01)
    return made


@pytest.mark.parametrize("squeue", ["", UNKNOWN])
def test_a_job_that_slurm_has_forgotten_is_over(slurm, squeue):
    slurm.wait("RUNNING", "silent", squeue=squeue)
    assert slurm.told == ["job 7 is RUNNING"]
    assert slurm.num_looks == 4 and not slurm.is_cancelled


def test_a_silent_slurm_does_not_end_the_wait_for_a_job(slurm):
    slurm.wait(*["silent"] * 5, "RUNNING", "COMPLETED")
    assert slurm.told == ["job 7 is unknown (SLURM does not answer)", "job 7 is RUNNING"]
    assert slurm.num_looks == 9


def test_an_attempt_that_has_reached_the_end_needs_no_word_of_slurm(slurm):
    slurm.run.new_attempt("7-0").end(DONE, "")
    slurm.wait("silent")
    assert slurm.num_looks == 3


def test_after_an_attempt_that_goes_on_a_silent_slurm_is_asked_again(slurm):
    slurm.run.new_attempt("7-0").end(FAILED, "the driver was killed", can_go_on=True)
    with pytest.raises(RunError, match="SLURM does not answer"):
        slurm.wait("silent", patience_s=0.3)
    assert slurm.num_looks > 3 and slurm.is_cancelled


def test_a_requeued_job_that_waits_too_long_is_cancelled(slurm):
    slurm.run.new_attempt("7-0").end(FAILED, "the driver was killed", can_go_on=True)
    with pytest.raises(RunError, match=r"waited for 0 min \(Resources\)"):
        slurm.wait("RUNNING Reason=None", "PENDING Reason=Resources", patience_s=0.3)
    assert slurm.is_cancelled


def test_the_time_in_which_a_job_runs_is_no_waiting(slurm):
    running = ["RUNNING"] * 40
    slurm.wait("PENDING", *running, "PENDING", "RUNNING", "COMPLETED", patience_s=0.25)
    assert not slurm.is_cancelled


def test_a_refused_rung_fails_with_the_reason(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise RunError("sbatch refused the job: invalid partition")

    monkeypatch.setattr(local, "run_local", refuse)
    words = ["--local", "--run-root", str(tmp_path / "runs"), "--report", str(tmp_path / "report")]
    assert command.main(words) == 1
    text = (tmp_path / "report" / "acceptance.txt").read_text()
    assert "FAILED at one CPU slot" in text and "invalid partition" in text
    assert text.count("NOT REACHED") == 5


@pytest.mark.parametrize(
    "flag", [["--dry-run"], ["--sweep", "x"], ["--tp-siz", "2"], ["--up-to", "roof"]]
)
def test_what_makes_no_sense_is_refused_in_one_line(flag, capsys):
    assert command.main(["--local", *flag]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_nothing_heavy_is_loaded_on_a_login_node():
    heavy = "{'torch', 'ray', 'transformers', 'megatron'}"
    code = f"import sys, tools.acceptance.command; print({heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "set()\n"
