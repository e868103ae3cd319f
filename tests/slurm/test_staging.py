"""Model and environment on the nodes' own disks, in a real job: Ray, an engine and trainers start
from the copies, and nothing else is read.

The environment is one whose packages are a link, so that the copy is small; its interpreter and
its scripts are files of the copy.
"""

import json
import sys
from pathlib import Path

import pytest

from jobs.checkout import ROOT
from jobs.staging import Copy, packed_environment, why_not
from nanoslime import rehearsal
from nanoslime.config.run import RehearsalConfig
from nanoslime.run_dir import DONE, RunDir
from nanoslime.storage.shared_files import read_json
from tests import process_table
from tests.slurm.cluster import SlurmCluster
from tools.submit import grpo

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.ray,
    pytest.mark.sglang,
    pytest.mark.megatron,
    pytest.mark.matrix,
]
SIZES = "--nodes 2 --tp-size 2 --pp-size 1 --num-rollout 2 --eval.max-prompts 20"
# What has to start from the copy: a part of its command, by what it is.
STARTED = {
    "Ray": "/bin/ray start",
    "the driver": "/bin/python -P -m nanoslime.train",
    "the engine": "/bin/python -P -m sglang.launch_server",
}


def make_venv(venv: Path) -> Path:
    """An environment with its own interpreter and scripts, and the packages of this one."""
    (venv / "bin").mkdir(parents=True)
    (venv / "pyvenv.cfg").write_text(f"home = {sys.base_prefix}/bin\n")
    (venv / "lib").symlink_to(Path(sys.prefix) / "lib")
    (venv / "bin" / "python").symlink_to(Path(sys.executable).resolve())
    ray = Path(sys.prefix, "bin", "ray").read_text()
    (venv / "bin" / "ray").write_text(ray.replace(sys.prefix, str(venv)))
    (venv / "bin" / "ray").chmod(0o755)
    return venv


@pytest.mark.timeout(900)
def test_engine_trainers_and_ray_of_a_real_job_start_from_the_copies(
    slurm_cluster: SlurmCluster,
    no_leftovers: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    disk = tmp_path / "disk"
    if why_not(disk):
        pytest.skip(f"{tmp_path} is in memory")
    monkeypatch.setenv("SLURM_CONF", str(slurm_cluster.config_file))
    monkeypatch.chdir(ROOT)
    files = rehearsal.make(tmp_path / "files", RehearsalConfig())
    venv = make_venv(tmp_path / "shared" / "venv")
    words = [*SIZES.split(), "--recipe", "rehearsal", "--rehearsal.no-enabled"]
    words += ["--hf-checkpoint", str(files.model), "--prompts", str(files.train)]
    words += ["--eval-prompts", str(files.held_out), "--run-root", str(tmp_path / "runs")]
    words += ["--cluster.local-storage", str(disk), "--cluster.stage-environment"]
    words += ["--cluster.venv", str(venv), "--name", "staged"]
    assert grpo.main(words) == 0
    run = RunDir.open(tmp_path / "runs" / "staged")
    model = Copy.of(files.model, disk).path
    environment = Copy.of_environment(packed_environment(run), disk).path
    assert process_table.wait_for(run.latest_attempt, 60)
    attempt = run.attempt(1)
    are_staged = [
        *(attempt.staged(node) for node in range(2)),
        *(attempt.path / "environments" / f"{node}.json" for node in range(2)),
    ]
    assert process_table.wait_for(lambda: all(file.exists() for file in are_staged), 200, 0.2)
    # Who reads the shared weights from now on finds none.
    (files.model / "model.safetensors").write_bytes(b"")
    missing = {what: f"{environment}{part}" for what, part in STARTED.items()}
    missing["the engine's model"] = f"--model-path {model}"

    def is_over() -> bool:
        for process in process_table.all_processes().values():
            command = process.command
            for what in [what for what, part in missing.items() if part in command]:
                del missing[what]
        return attempt.ended() is not None

    assert process_table.wait_for(is_over, 600, 0.2)
    logs = {file: file.read_text(errors="replace")[-1500:] for file in run.path.rglob("*.log")}
    assert attempt.ended() == (DONE, ""), logs
    assert missing == {}
    said = [read_json(file) for file in are_staged]
    assert [each["note"] for each in said] == [""] * 4
    assert [each["path"] for each in said] == [str(model)] * 2 + [str(environment)] * 2
    # Both nodes are one machine: one of them has copied.
    assert sorted(each["copied_bytes"] > 0 for each in said) == [False, False, True, True]
    steps = [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()]
    assert steps == [0, 1]
