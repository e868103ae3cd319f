"""What a rung's driver measures beside the run."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.acceptance import driver


@pytest.fixture
def processes() -> Iterator[dict[str, int]]:
    """By name the id of a process that calls itself so, as Ray's workers do."""
    names = ["ray::RankActor.train", "ray::RankActor", "sglang::scheduler_TP0"]
    started = [subprocess.Popen([name, "60"], executable="/bin/sleep") for name in names]
    yield {name: process.pid for name, process in zip(names, started, strict=True)}
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in that knows processes only where it is asked for them."""
    program = tmp_path / "nvidia-smi"
    asked = "--query-compute-apps=pid,used_memory --format=csv,noheader,nounits"
    answer = f'case "$*" in "{asked}") cat {tmp_path}/apps ;; *) echo 90000 ;; esac'
    program.write_text(f"#!/bin/sh\n{answer}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    # The processes of this test are children of the agent that it stands for.
    monkeypatch.setattr(os, "getppid", os.getpid)
    return tmp_path / "apps"


def test_of_a_gpu_only_what_trainers_hold_is_measured(processes, nvidia_smi):
    first, second, engine = processes.values()
    nvidia_smi.write_text(f"{first}, 5000\n{second}, 7000\n{engine}, 70000\n1, 80000\n")
    assert driver._gpu_bytes() == 7000 << 20


def test_a_gpu_that_does_not_tell_its_processes_measures_nothing(processes, nvidia_smi):
    first, *_ = processes.values()
    nvidia_smi.write_text(f"{first}, [N/A]\n")
    assert driver._gpu_bytes() == 0
    nvidia_smi.write_text("")
    assert driver._gpu_bytes() == 0
