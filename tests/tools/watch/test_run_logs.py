"""The logs of a run's processes as one."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.checkout import ROOT
from nanoslime.run_dir import RunDir
from tests.jobs.made_run import make_run

DRIVER = "no time yet\n2026-11-28 10:00:02,500 begin\n  more of it\n2026-11-28 10:00:05,000 end\n"
TRAINER = "2026-11-28 10:00:01,000 INFO one\n2026-11-28 10:00:04,000 ERROR two\n"
ENGINE = "[2026-11-28 10:00:03] INFO: ready\n[2026-11-28T10:00:06] \xff bytes\nnot ended"


@pytest.fixture
def run(tmp_path) -> RunDir:
    run = make_run(tmp_path, 1).run
    first = run.new_attempt()
    first.log("driver", 0).write_text("2026-11-28 09:00:00,000 before\n")
    second = run.new_attempt()
    second.log("driver", 0).write_text(DRIVER)
    second.log("trainer", 0).write_text(TRAINER)
    second.log("trainer", 10).write_text("2026-11-28 10:00:04,500 INFO ten\n")
    second.log("sglang", 0).write_bytes(ENGINE.encode("latin-1"))
    return run


def test_lines_of_all_processes_stand_in_the_order_of_their_times(run, told):
    assert told("logs", run.path).splitlines() == [
        "2 trainer-0 | 2026-11-28 10:00:01,000 INFO one",
        "2 driver-0 | no time yet",
        "2 driver-0 | 2026-11-28 10:00:02,500 begin",
        "2 driver-0 |   more of it",
        "2 sglang-0 | [2026-11-28 10:00:03] INFO: ready",
        "2 trainer-0 | 2026-11-28 10:00:04,000 ERROR two",
        "2 trainer-10 | 2026-11-28 10:00:04,500 INFO ten",
        "2 driver-0 | 2026-11-28 10:00:05,000 end",
        "2 sglang-0 | [2026-11-28T10:00:06] \N{REPLACEMENT CHARACTER} bytes",
        "2 sglang-0 | not ended",
    ]


@pytest.mark.parametrize(
    ("flags", "ends"),
    [
        (["--role", "trainer"], ["one", "two", "ten"]),
        (["--role", "trainer", "--rank", "0"], ["one", "two"]),
        (["--rank", "10"], ["ten"]),
        (["--grep", "ERROR|ten$"], ["two", "ten"]),
        (["--role", "driver", "--attempt", "1"], ["before"]),
        (["--role", "driver", "--attempt", "0", "--grep", "e(fore|nd)$"], ["before", "end"]),
        (["--role", "driver", "--tail", "1"], ["end"]),
        (["--role", "driver", "--tail", "0"], []),
        (["--role", "driver", "--tail", "99", "--grep", "begin"], ["begin"]),
    ],
)
def test_a_choice_of_lines(run, told, flags, ends):
    assert [line.split()[-1] for line in told("logs", run.path, *flags).splitlines()] == ends


@pytest.mark.parametrize("flags", [["--role", "reward"], ["--attempt", "7"], ["--rank", "3"]])
def test_a_choice_that_no_log_meets_is_said(run, refused, flags):
    assert "has no logs of this choice" in refused("logs", run.path, *flags)


def test_a_run_without_an_attempt_has_no_logs(tmp_path, refused):
    assert "has no logs" in refused("logs", make_run(tmp_path, 1).run.path)


def test_what_is_no_regular_expression_is_said(run, refused):
    assert "--grep '(' is no regular expression: missing )" in refused(
        "logs", run.path, "--grep", "("
    )


def follow(run: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "jobs/runs.py", "logs", str(run), "--follow", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_followed_logs_go_on_with_whole_lines_and_with_new_processes(run):
    log = run.attempt(2).log("driver", 0)
    with follow(run.path, "--tail", "1", "--grep", "end|new") as process:
        try:
            assert process.stdout.readline() == "2 driver-0 | 2026-11-28 10:00:05,000 end\n"
            with log.open("a") as file:
                file.write("a new li")
                file.flush()
                run.attempt(2).log("worker", 0).write_text("new too\n")
                assert process.stdout.readline() == "2 worker-0 | new too\n"
                file.write("ne\n")
            assert process.stdout.readline() == "2 driver-0 | a new line\n"
            third = run.new_attempt()
            third.log("driver", 0).write_text("a new attempt\n")
            assert process.stdout.readline() == "3 driver-0 | a new attempt\n"
        finally:
            process.kill()


def test_whoever_stops_to_follow_hears_nothing(run):
    command = shlex.join([sys.executable, "jobs/runs.py", "logs", str(run.path)])
    done = subprocess.run(
        f"{command} | head -n 1", shell=True, capture_output=True, text=True, cwd=ROOT
    )
    assert (done.stdout.count("\n"), done.stderr) == (1, "")
