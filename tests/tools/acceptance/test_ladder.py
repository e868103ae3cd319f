"""The ladder: each rung only where the one below it passed."""

import subprocess
import sys

import pytest

from jobs import local, submit_grpo
from jobs.checkout import ROOT
from nanoslime.types import RunError
from tools.acceptance import checks, command, ladder
from tools.acceptance.checks import Check


@pytest.fixture
def climbed(tmp_path, monkeypatch):
    """What becomes of the rungs where those of these names fail; nothing is run."""

    def climb(fails=(), max_nodes=None):
        flags = ["--run-root", str(tmp_path / "runs")]
        asked, flags = submit_grpo.parse(flags)
        site = ladder.Site(asked, flags, submits=False, max_nodes=max_nodes, patience_s=1.0)
        monkeypatch.setattr(local, "run_local", lambda *arguments: 0)

        def of_run(run):
            is_bad = run.name.removeprefix("acceptance-") in fails
            return [Check("steps", checks.FAILED_CHECK if is_bad else checks.PASSED, "told")]

        monkeypatch.setattr(checks, "of_run", of_run)
        report = ladder.climb(site, lambda text: None)
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
