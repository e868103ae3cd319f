"""The test session's own promises: leftovers are found and ended, a skip can be forbidden."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests import process_table

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run_inner(tmp_path: Path):
    """Run a test file in a pytest of its own, with this project's conftest."""

    def run(source: str, *options: str) -> subprocess.CompletedProcess[str]:
        file = tmp_path / "test_inner.py"
        file.write_text(textwrap.dedent(source))
        command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml")]
        command += ["-o", "addopts=--import-mode=importlib"]  # without fixtures that import torch
        command += ["-p", "no:cacheprovider", "-p", "tests.conftest", *options, str(file)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    return run


def test_a_daemon_left_behind_fails_the_test_and_is_ended(run_inner, tmp_path):
    pid_file = tmp_path / "pid"
    result = run_inner(f"""
        import subprocess
        def test_daemon(no_leftovers):
            # a double fork in its own session, with an environment that tells nothing
            daemon = "echo $$ > {pid_file}; exec sleep 61"
            subprocess.run(["env", "-i", "setsid", "--fork", "bash", "-c", daemon], check=True)
        """)
    assert result.returncode == 1, result.stdout
    assert "left behind" in result.stdout and "sleep 61" in result.stdout
    assert int(pid_file.read_text()) not in process_table.all_processes()


def test_an_ended_process_is_no_leftover(run_inner):
    result = run_inner("""
        import subprocess
        def test_tidy(no_leftovers):
            child = subprocess.Popen(["sleep", "61"])
            child.kill()
        """)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("options", "returncode"),
    [([], 0), (["--require-slurm"], 1)],
    ids=["allowed", "forbidden"],
)
def test_require_slurm_turns_a_skip_into_a_failure(run_inner, options, returncode):
    result = run_inner(
        """
        import pytest
        @pytest.mark.sglang
        def test_needs_engine():
            pytest.skip("no engine")
        def test_other():
            pass
        def test_unmarked():
            pytest.skip("may skip")
        """,
        *options,
    )
    assert result.returncode == returncode, result.stdout
    assert ("test_needs_engine: skipped although" in result.stdout) == bool(options)


@pytest.mark.parametrize(("options", "returncode"), [([], 5), (["--require-slurm"], 2)])
def test_require_slurm_refuses_a_module_skipped_as_a_whole(run_inner, options, returncode):
    result = run_inner('import pytest\npytest.importorskip("no_such_module")\n', *options)
    assert result.returncode == returncode, result.stdout


def test_without_slurmctld_one_line_names_the_installer(run_inner):
    result = run_inner("""
        import shutil
        shutil.which = lambda name: None
        import pytest
        @pytest.mark.slurm
        @pytest.mark.parametrize("i", range(3))
        def test_cluster(i):
            raise AssertionError
        """)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("env/install_slurm.sh") == 1
    assert "3 SLURM tests skipped" in result.stdout
