"""env/run.sh makes an environment once, says what is wrong, and goes on where a set-up stopped."""

import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.env.checkout import BACKEND_IN_TREE, Checkout, finish, kill_group, write_wheel

STAMP = ".venv/cpu/.nanoslime-target"
TINY_VERSION = "import tiny; print(tiny.version)"


def test_two_calls_at_the_same_time_make_one_environment(checkout):
    processes = [checkout.start("echo", "ran") for _ in range(2)]
    results = [finish(process) for process in processes]
    assert [result.returncode for result in results] == [0, 0], results
    assert [result.out for result in results] == ["ran\n", "ran\n"]
    assert sum("ready after" in result.err for result in results) == 1
    assert sum("waiting for another set-up" in result.err for result in results) == 1
    assert (checkout.root / STAMP).read_text().splitlines()[0] == "target=cpu"


def test_a_command_keeps_its_arguments_its_directory_and_its_exit_status(checkout, tmp_path):
    assert checkout.run("true").returncode == 0
    later = checkout.run("bash", "-c", "exit 7")
    assert (later.returncode, later.out, later.err) == (7, "", "")

    code = "import os, sys, tiny; print(sys.prefix, os.getcwd(), tiny.version, sys.argv[1])"
    argument = """it's "quoted" $HOME"""
    result = checkout.run("python", "-c", code, argument, cwd=tmp_path)
    expected = f"{checkout.root}/.venv/cpu {tmp_path} 1.0 {argument}\n"
    assert (result.returncode, result.out) == (0, expected), result.err


def test_a_changed_pyproject_installs_only_the_project_again(checkout):
    assert checkout.run("true").returncode == 0
    (checkout.root / "pyproject.toml").write_text(BACKEND_IN_TREE + "# a new entry point\n")
    result = checkout.run("python", "-c", "import project_marker")
    assert result.returncode == 0
    assert result.err.splitlines() == ["env/run.sh: nanoslime itself ..."]


def test_an_environment_that_is_ready_needs_no_python_and_a_changed_lock_does(checkout):
    assert checkout.run("true").returncode == 0
    checkout.set("NANOSLIME_PYTHON", "/nonexistent")
    assert checkout.run("true").returncode == 0

    checkout.lock("tiny==2.0")
    refused = checkout.run("echo", "ran")
    assert (refused.returncode, refused.out) == (1, "")
    assert "needs Python 3.12, but NANOSLIME_PYTHON=/nonexistent is not usable" in refused.err


def test_a_failed_step_names_its_log_and_the_next_call_goes_on_with_it(checkout):
    checkout.lock("tiny==1.0", "absent==3.0")
    failed = checkout.run("echo", "ran")
    assert (failed.returncode, failed.out) == (1, "")
    assert "failed: 2 packages (after" in failed.err
    assert f"The whole log is {checkout.root}/.venv/cpu.log" in failed.err
    assert "absent==3.0" in failed.err, "the cause stands in the output"
    assert not (checkout.root / STAMP).exists()

    write_wheel(checkout.wheels, "absent", "3.0")
    continued = checkout.run("python", "-c", "import absent, tiny; print(absent.version)")
    assert (continued.returncode, continued.out) == (0, "3.0\n"), continued.err
    assert "going on with the set-up of .venv/cpu" in continued.err


def test_a_changed_lock_begins_anew_after_a_failure(checkout):
    checkout.lock("tiny==3.0")
    assert checkout.run("true").returncode == 1
    checkout.lock("tiny==2.0")
    result = checkout.run("python", "-c", TINY_VERSION)
    assert (result.returncode, result.out) == (0, "2.0\n")
    assert "making .venv/cpu" in result.err and "going on" not in result.err


def test_a_set_up_that_is_killed_while_it_builds_keeps_what_it_installed(checkout):
    """The second call could not install the lock again: its wheel and uv's cache are gone."""
    checkout.slow_package()
    checkout.lock("slow==1.0", name="cpu.pinned.txt")
    kill_at_the_build(checkout)
    (checkout.wheels / "tiny-1.0-py3-none-any.whl").unlink()
    shutil.rmtree(checkout.folder / "uv-cache")

    checkout.let_build_end()
    code = "import slow, tiny; print(slow.version, tiny.version)"
    result = checkout.run("python", "-c", code)
    assert (result.returncode, result.out) == (0, "1.0 1.0\n"), result.err
    said = [line.removeprefix("env/run.sh: ") for line in result.err.splitlines()]
    assert said[:4] == [
        "going on with the set-up of .venv/cpu",
        "1 packages: done before",
        "building slow==1.0 ...",
        "nanoslime itself ...",
    ]
    assert checkout.run("true").err == ""


def test_a_set_up_that_is_killed_while_it_installs_leaves_no_half_of_a_package(checkout):
    checkout.slow_package()
    checkout.lock("tiny==1.0", "slow==1.0")
    kill_at_the_build(checkout)
    packages = checkout.root / ".venv/cpu/lib/python3.12/site-packages"
    half = packages / "tiny-1.0.dist-info"
    half.mkdir()
    (half / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")

    checkout.let_build_end()
    result = checkout.run("python", "-c", TINY_VERSION)
    assert (result.returncode, result.out) == (0, "1.0\n"), result.err
    assert "going on with the set-up of .venv/cpu" in result.err


def test_a_killed_set_up_of_another_lock_is_not_continued(checkout):
    checkout.slow_package()
    checkout.lock("slow==1.0", name="cpu.pinned.txt")
    kill_at_the_build(checkout)
    checkout.let_build_end()
    checkout.lock("tiny==2.0")
    result = checkout.run("python", "-c", TINY_VERSION)
    assert (result.returncode, result.out) == (0, "2.0\n"), result.err
    assert "making .venv/cpu" in result.err and "done before" not in result.err


def kill_at_the_build(checkout: Checkout) -> None:
    process = checkout.start("true")
    await_file(checkout.build_begun, process)
    kill_group(process)
    assert not (checkout.root / STAMP).exists()


def await_file(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_paths_of_other_environments_do_not_count_as_installed(checkout, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "tiny-1.0.dist-info").mkdir(parents=True)
    (elsewhere / "tiny-1.0.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n"
    )
    checkout.set("PYTHONPATH", elsewhere)
    assert checkout.run("true").returncode == 0
    assert (checkout.root / ".venv/cpu/lib/python3.12/site-packages/tiny.py").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "gpu", "true"], "--target is 'gpu'; choose cpu or cuda"),
        (["--target"], "--target is ''; choose cpu or cuda"),
        (["--frobnicate", "true"], "unknown option --frobnicate"),
        ([], "usage: bash env/run.sh"),
    ],
)
def test_a_wrong_call_says_what_is_right(checkout, arguments, message):
    result = checkout.run(*arguments)
    assert (result.returncode, result.out) == (2, "")
    assert message in result.err


def test_help_names_both_targets_and_the_default(checkout):
    result = checkout.run("--help")
    assert result.returncode == 0
    assert "--target cpu    (default)" in result.out
    assert "--target cuda" in result.out
