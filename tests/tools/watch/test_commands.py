"""The command line itself."""

import signal
import subprocess
import sys

import pytest

from jobs.checkout import ROOT
from tests.jobs.made_run import make_run
from tools.watch import commands

NAMES = "ps status top logs attach tunnel stop report samples sync compare".split()


def test_the_help_has_an_example_of_each_command(capsys):
    with pytest.raises(SystemExit):
        commands.main(["--help"])
    text = capsys.readouterr().out
    for name in NAMES:
        assert f"python3 jobs/runs.py {name}" in text
        with pytest.raises(SystemExit):
            commands.main([name, "--help"])
        assert "RUN" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_run_is_named(name, refused, tmp_path):
    assert f"{tmp_path} is not a run directory" in refused(name, tmp_path)


def test_top_shows_it_again_until_it_is_interrupted(tmp_path):
    """From another directory, as a user may start it."""
    make_run(tmp_path / "runs", 1)
    command = [sys.executable, f"{ROOT}/jobs/runs.py", "top", "--every", "0.1"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        # A shell that starts the tests in the background has it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with process:
        for _ in range(2):
            assert process.stdout.readline() == "\x1b[H\x1b[2J\n"
            assert process.stdout.readline().startswith("run  ")
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr.read() == ""


def test_nothing_heavy_is_loaded():
    heavy = "{'torch', 'ray', 'transformers', 'megatron'}"
    code = f"import sys, tools.watch.commands; print({heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "set()\n"
