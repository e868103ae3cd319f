"""From a clone to the first step on a cluster that nobody has described: commands and answers are
counted. No file is edited, and nothing is exported that a login shell does not have.
"""

import hashlib
import json
import os
import pwd
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from jobs.checkout import ROOT
from nanoslime.run_dir import RunDir
from tests import process_table
from tests.slurm.cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.ray]
# The least that has a first step: one node, and an engine in the driver.
SMALL = (
    "--nodes 1 --engine embedded --num-rollout 1 --rollout-batch-size 8 "
    "--rehearsal.num-held-out 20 --rehearsal.target-reward 0.01"
)


@dataclass
class Terminal:
    """What a person types in a login shell, and what they are asked."""

    directory: Path
    environ: dict[str, str]
    commands: list[str] = field(default_factory=list)
    num_answers: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def type(self, command: str, answers: str = "") -> str:
        """The output of a command that has to succeed."""
        self.commands.append(command)
        begin = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.directory,
            env=self.environ,
            input=answers,
            capture_output=True,
            text=True,
            timeout=120,
        )
        self.seconds[command] = time.monotonic() - begin
        assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"
        self.num_answers += done.stdout.count("]: ")
        return done.stdout


def clone(to: Path) -> None:
    """A clone of this checkout, with what is not committed yet."""
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(to)], check=True)
    listing = ["git", "ls-files", "-z", "--modified", "--others", "--exclude-standard"]
    changed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in changed.split("\0"):
        if name and (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def link_environment(checkout: Path) -> None:
    """The environment of these tests stands where env/run.sh would have made one, so that it has
    nothing to install. Its stamps are this checkout's own.
    """
    venv = checkout / ".venv/cpu"
    venv.mkdir(parents=True)
    for name in ("bin", "lib", "include", "pyvenv.cfg"):
        (venv / name).symlink_to(Path(sys.prefix) / name)
    lock = f"target=cpu\nlock_sha256={sha256(checkout / 'env/cpu.lock')}\ncheckout={checkout}\n"
    (venv / ".nanoslime-target").write_text(lock)
    project = f"pyproject_sha256={sha256(checkout / 'pyproject.toml')}\n"
    (venv / ".nanoslime-project").write_text(project)


def login_shell(cluster: SlurmCluster, home: Path) -> dict[str, str]:
    """SLURM_CONF stands for the /etc/slurm of a real login node."""
    user = pwd.getpwuid(os.geteuid()).pw_name
    environ = {
        "HOME": str(home),
        "USER": user,
        "LOGNAME": user,
        "SHELL": "/bin/bash",
        "LANG": "C.UTF-8",
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "SLURM_CONF": str(cluster.config_file),
    }
    if "NANOSLIME_TEST_MARKER" in os.environ:
        environ["NANOSLIME_TEST_MARKER"] = os.environ["NANOSLIME_TEST_MARKER"]
    return environ


@pytest.fixture
def terminal(slurm_cluster: SlurmCluster, no_leftovers: None, tmp_path: Path) -> Terminal:
    """A login shell in a clone that has its environment, at home in an empty directory."""
    checkout = tmp_path / "nanoslime"
    clone(checkout)
    link_environment(checkout)
    (tmp_path / "home").mkdir()
    return Terminal(checkout, login_shell(slurm_cluster, tmp_path / "home"))


def describe_and_submit(terminal: Terminal) -> tuple[str, str]:
    """What the two commands say; nobody edits a file meanwhile, nor answers more than Enter."""
    files = [path for path in terminal.directory.rglob("*.yaml") if ".venv" not in path.parts]
    before = {path: sha256(path) for path in files}
    described = terminal.type("bash env/run.sh python jobs/init_site.py", answers="\n" * 6)
    submitted = terminal.type(f"python3 jobs/submit_grpo.py {SMALL}")
    assert before == {path: sha256(path) for path in files}
    return described, submitted


def job_of(submitted: str) -> int:
    [job_id] = re.findall(r"^submitted job (\d+)$", submitted, re.MULTILINE)
    return int(job_id)


def test_three_commands_and_six_answers_lead_to_a_running_job(terminal, slurm_cluster):
    described, submitted = describe_and_submit(terminal)
    slurm_cluster.wait_state(job_of(submitted), "RUNNING", timeout_s=60)
    assert "cluster   test, as " in submitted
    assert (len(terminal.commands), terminal.num_answers) == (2, 3)
    assert len(terminal.commands) <= 3
    assert terminal.num_answers <= 6
    slurm_cluster.run("scancel", str(job_of(submitted)))
    # What the commands themselves say may be typed next works, too.
    [next_command] = [line.strip() for line in described.splitlines() if "submit_grpo.py" in line]
    assert "--- batch script" in terminal.type(f"{next_command} --dry-run")
    slurm_cluster.wait_state(job_of(submitted), "CANCELLED", timeout_s=60)
    [resume] = re.findall(r"^  resume +(.+)$", submitted, re.MULTILINE)
    assert "--resume" in shlex.split(resume)
    terminal.type(f"{resume} --dry-run")


@pytest.mark.matrix
@pytest.mark.timeout(500)
def test_the_job_makes_its_first_step(terminal, slurm_cluster, tmp_path):
    begin = time.monotonic()
    _, submitted = describe_and_submit(terminal)
    run = RunDir.open(tmp_path / "home/nanoslime-runs/rehearsal")

    def first_step_or_failure() -> bool:
        return run.metrics.exists() or run.status().get("phase") == "failed"

    assert process_table.wait_for(first_step_or_failure, 300, 0.2), submitted
    took = [f"{seconds:.1f} s: {command}" for command, seconds in terminal.seconds.items()]
    print(f"first step after {time.monotonic() - begin:.1f} s", *took, sep="\n")
    assert json.loads(run.metrics.read_text().splitlines()[0])["step"] == 0
    slurm_cluster.wait_state(job_of(submitted), "COMPLETED", timeout_s=120)
