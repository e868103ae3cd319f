"""Sick nodes of a real SLURM: each is named and left out, before Ray starts.

A node is made sick as in reality, by what its slurmd passes on to all that runs there: its limits,
or what its mount namespace shows in place of a file or of a folder.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nanoslime.run_dir import DONE, FAILED
from nanoslime.storage.shared_files import read_json
from tests import process_table
from tests.jobs.made_run import driver, make_run, make_venv_with_fake_ray, scratches
from tests.slurm.cluster import SlurmCluster
from tests.slurm.test_jobs import logs
from tools.submit.slurm_submit import submit_sbatch

pytestmark = pytest.mark.slurm
_FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
_DEADLINE_S = 100.0


@pytest.fixture
def slurm(no_leftovers: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    """A cluster of the test's own, since its nodes become sick, as a user's shell sees it."""
    with SlurmCluster() as cluster:
        monkeypatch.setenv("SLURM_CONF", str(cluster.config_file))
        yield cluster


def make_sick(cluster: SlurmCluster, name: str, *prefix: str) -> None:
    """The node's slurmd starts anew behind a command that changes what its processes see."""
    cluster._stop_daemon(f"slurmd-{name}")
    cluster._spawn(f"slurmd-{name}", *prefix, "slurmd", "-D", "-N", name)
    cluster._wait_idle(cluster.node_names)


def behind_mounts(*commands: str) -> list[str]:
    """A prefix that runs these commands in a mount namespace of its own; skips where it may not."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("only root may make a mount namespace")
    script = "\n".join(["set -e", *commands, 'exec "$@"'])
    return ["unshare", "-m", "sh", "-c", script, "sh"]


def few_files(tmp_path: Path) -> list[str]:
    return ["prlimit", "--nofile=1000:1000"]


def little_shared_memory(tmp_path: Path) -> list[str]:
    return behind_mounts("mount -t tmpfs -o size=64m none /dev/shm")


def another_torch(tmp_path: Path) -> list[str]:
    """A file of the environment that only this node has otherwise."""
    folder = next(Path(sys.prefix).glob("lib/python3*/site-packages/torch-*.dist-info"))
    metadata = tmp_path / "METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.0.1\n")
    return behind_mounts(f"mount --bind {shlex.quote(str(metadata))} {folder}/METADATA")


def slow_clock(tmp_path: Path) -> list[str]:
    """Debian's libfaketime, for all programs of this node."""
    if not _FAKETIME.exists():
        pytest.skip("libfaketime is not installed")
    preload = tmp_path / "ld.so.preload"
    preload.write_text(f"{_FAKETIME}\n")
    config = tmp_path / "faketimerc"
    config.write_text("-60s\n")
    # A copy of /etc, which alone has the two files.
    copy = "mount -t tmpfs none /mnt && cp -a /etc /mnt"
    preload_all = (
        f"cp {shlex.quote(str(config))} /mnt/etc/ && cp {shlex.quote(str(preload))} /mnt/etc/"
    )
    return behind_mounts(copy, preload_all, "mount --bind /mnt/etc /etc")


FAULTS: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "few files": (few_files, r"{} allows 1,000 open files \(ulimit -n\), and 4,096 are needed"),
    "little shared memory": (little_shared_memory, r"/dev/shm of {}, .*0.06 GiB free, and 0.25 "),
    "another torch": (another_torch, r"{} has torch 2.0.1 \(not [0-9.]+\), unlike the other nodes"),
    "slow clock": (slow_clock, r"the clock of {} is [56]\d s behind those of the other nodes"),
}


@pytest.mark.parametrize(
    ("fault", "node"),
    [
        ("few files", "n4"),
        pytest.param("slow clock", "n1", marks=pytest.mark.matrix),
        pytest.param("little shared memory", "n2", marks=pytest.mark.matrix),
        pytest.param("another torch", "n3", marks=pytest.mark.matrix),
    ],
)
def test_a_run_starts_without_a_sick_node_where_the_others_are_enough(
    slurm: SlurmCluster, tmp_path: Path, fault: str, node: str
) -> None:
    """Also where it would have held trainers, or the batch script."""
    inject, says = FAULTS[fault]
    make_sick(slurm, node, *inject(tmp_path))
    venv = str(make_venv_with_fake_ray(tmp_path / "venv"))
    made = make_run(tmp_path, 4, venv=venv)
    job_id = submit_sbatch(made.config, made.layout, made.run, driver("until-stop"))
    fields = slurm.wait_state(int(job_id), "COMPLETED", timeout_s=_DEADLINE_S)
    first, second = made.run.all_attempts()
    code, reason = first.ended() or (DONE, "")
    assert code == FAILED
    assert re.match("preflight: " + says.format(node), reason), reason
    others = [name for name in slurm.node_names if name != node]
    assert f"goes on without the lost nodes, on {', '.join(others)} (1 of 10" in logs(made)
    assert second.ended() == (DONE, "")
    assert second.layout == made.layout.on(3)
    joined = [read_json(second.path / "nodes" / f"{i}.json")["name"] for i in range(3)]
    assert joined == others
    assert fields["Restarts"] == "0"
    output = (made.run.path / f"slurm-{job_id}.out").read_text()
    assert re.search(rf"UNFIT +.* {node}\n", output), output
    assert scratches(tmp_path) == []


@pytest.mark.parametrize("resume_by", ["requeue", pytest.param("chain", marks=pytest.mark.matrix)])
def test_a_job_that_needs_all_its_nodes_starts_anew_on_others(
    slurm: SlurmCluster, tmp_path: Path, resume_by: str
) -> None:
    make_sick(slurm, "n1", *few_files(tmp_path))
    venv = str(make_venv_with_fake_ray(tmp_path / "venv"))
    made = make_run(tmp_path, 2, venv=venv, resume_by=resume_by)
    job_id = submit_sbatch(made.config, made.layout, made.run, driver("until-stop"))

    def has_ended() -> bool:
        attempt = made.run.latest_attempt()
        return attempt is not None and attempt.number == 2 and attempt.ended() is not None

    assert process_table.wait_for(has_ended, _DEADLINE_S), logs(made)
    holder = read_json(made.run.job)["job_id"]
    fields = slurm.wait_state(int(holder), "COMPLETED", timeout_s=_DEADLINE_S)
    assert made.end == (DONE, "")
    goes_on = "requeued" if resume_by == "requeue" else f"goes on in job {holder}"
    assert re.search(
        rf"attempt 1 ended: preflight: n1 allows .*; {goes_on} without n1 ", logs(made)
    )
    assert fields["ExcNodeList"] == "n1"
    assert "n1" not in slurm.run("scontrol", "show", "hostnames", fields["NodeList"]).stdout.split()
    assert (holder == job_id) == (resume_by == "requeue")


@pytest.mark.matrix
def test_a_job_that_has_no_other_nodes_says_so_and_does_not_wait_for_ever(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    make_sick(slurm, "n1", *few_files(tmp_path))
    venv = str(make_venv_with_fake_ray(tmp_path / "venv"))
    made = make_run(tmp_path, 2, venv=venv, extra_sbatch={"exclude": "n3,n4"})
    job_id = submit_sbatch(made.config, made.layout, made.run, driver("until-stop"))
    slurm.wait_state(int(job_id), "FAILED", timeout_s=_DEADLINE_S)
    assert re.search("not requeued: without n1,n.* SLURM has no nodes for the job", logs(made))
