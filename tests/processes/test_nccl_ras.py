"""Of the processes of a job, the one that listens for NCCL's RAS is asked, and no other."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanoslime.config.cluster import ClusterConfig
from nanoslime.doctor import Doctor
from nanoslime.processes.nccl_ras import ras_report
from nanoslime.processes.ports import free_port
from nanoslime.run_dir import RunDir

# It answers as RAS does: by a text after the line, and by the end of the connection.
RAS = """
import socket, sys
with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as server:
    print("listens", flush=True)
    while True:
        connection, _ = server.accept()
        with connection, connection.makefile("rw") as text:
            asked = text.readline()
            text.write(f"NCCL version 2.30\\nasked for {asked}Errors: rank 3 does not answer\\n")
"""
TOLD = "NCCL version 2.30\nasked for verbose status\nErrors: rank 3 does not answer\n"


@pytest.fixture
def rank() -> Iterator[tuple[int, str]]:
    """A process that listens, and its address."""
    port = free_port("127.0.0.1")
    command = [sys.executable, "-c", RAS, str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "listens\n"
        yield process.pid, f"127.0.0.1:{port}"
        process.kill()


def test_the_process_that_listens_tells_of_the_whole_job(rank: tuple[int, str]) -> None:
    pid, address = rank
    assert ras_report([1, pid], {"NCCL_RAS_ADDR": address}) == TOLD


def test_another_job_that_holds_the_port_is_not_asked(rank: tuple[int, str]) -> None:
    _, address = rank
    assert ras_report([os.getpid()], {"NCCL_RAS_ADDR": address}) == ""


@pytest.mark.parametrize("address", ["", "nowhere", "127.0.0.1:nothing"])
def test_an_address_that_is_none_is_no_address(rank: tuple[int, str], address: str) -> None:
    pid, _ = rank
    assert ras_report([pid], {"NCCL_RAS_ADDR": address}) == ""


def test_processes_that_have_ended_listen_no_more() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    assert ras_report([process.pid], {}) == ""


def test_the_stacks_of_a_hang_have_it_with_them(
    rank: tuple[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid, address = rank
    monkeypatch.setenv("NCCL_RAS_ADDR", address)
    doctor = Doctor(ClusterConfig(), "n0", RunDir.create(tmp_path, "run").new_attempt())
    doctor.stacks.mkdir()
    doctor.write_stacks([pid], "node-0.txt")
    assert (doctor.stacks / "node-0-nccl-ras.txt").read_text() == TOLD


def test_a_job_without_nccl_has_no_such_file(tmp_path: Path) -> None:
    doctor = Doctor(ClusterConfig(), "n0", RunDir.create(tmp_path, "run").new_attempt())
    doctor.stacks.mkdir()
    doctor.write_stacks([], "node-0.txt")
    assert [file.name for file in doctor.stacks.iterdir()] == ["node-0.txt"]
