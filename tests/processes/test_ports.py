"""Free ports: a port with a listener anywhere on the host is passed over or refused."""

import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from nanoslime.processes.ports import answers, free_port, hold_consecutive_ports
from nanoslime.types import RunError


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_a_taken_port_is_passed_over(taken_port: int) -> None:
    # a listener elsewhere on the host counts too
    found, holder = hold_consecutive_ports(taken_port - 1, 2, "127.0.1.1")
    holder.close()
    assert taken_port not in found
    assert len(found) == 2
    assert found[0] > taken_port


def test_a_search_without_an_end_says_where_it_searched(taken_port: int) -> None:
    with pytest.raises(RunError, match=f"no 1 free ports on 127.0.0.1 from {taken_port} to"):
        hold_consecutive_ports(taken_port, 1, "127.0.0.1", num_tries=1)


def test_ports_that_nobody_has_bound_yet_are_given_to_one_process_until_it_ends() -> None:
    """Two jobs start on one node at the same time; each is a process of its own."""
    take = (
        "import sys; from nanoslime.processes.ports import hold_consecutive_ports as hold\n"
        "ports, holder = hold(int(sys.argv[1]), 2, '127.0.1.1'); print(ports, flush=True); input()"
    )
    first = free_port("127.0.1.1") // 2 * 2
    command = [sys.executable, "-c", take, str(first)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as one, subprocess.Popen(command, **pipes) as other:
        taken = [process.stdout.readline() for process in (one, other)]
        one.communicate("end\n")
        again, holder = hold_consecutive_ports(first, 2, "127.0.1.1")
        holder.close()
        other.communicate("end\n")
    assert taken[0] != taken[1]
    assert f"{again}\n" in (min(taken), taken[0])


def test_a_listener_answers_until_it_is_closed() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert answers("127.0.0.1", port)
    assert not answers("127.0.0.1", port)


def test_a_free_port_can_be_bound() -> None:
    port = free_port("127.0.0.1")
    assert 10_000 <= port < 20_000
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))
