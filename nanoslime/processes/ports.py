"""TCP ports of this host: which are free, and whether somebody listens on one."""

import random
import socket
from contextlib import suppress

from nanoslime.types import RunError

# Outgoing connections take ports from the ephemeral range, 32768 and up.
_PORTS = range(10_000, 20_000)
_NUM_TRIES = 50


def free_port(address: str) -> int:
    """A TCP port that nobody on this host has bound, for a server at `address`.

    The empty address stands for all addresses. The port is free now: bind it soon.
    """
    for port in random.SystemRandom().sample(_PORTS, _NUM_TRIES):
        if _is_free(address, port):
            return port
    raise RunError(
        f"no free port was found on {address or 'all addresses'}: {_NUM_TRIES} of "
        f"{_PORTS.start} to {_PORTS.stop} were tried"
    )


def hold_consecutive_ports(
    first: int, count: int, address: str, num_tries: int = 100
) -> tuple[list[int], socket.socket]:
    """`count` consecutive ports from `first` on, the next `count` where one is taken.

    No other caller on this host, of whatever user, gets them while the socket is open: it has the
    name of the first one, in the abstract namespace of AF_UNIX, which leaves no file.
    """
    end = first + num_tries * count
    for start in range(first, end, count):
        holder = socket.socket(socket.AF_UNIX)
        with suppress(OSError):
            holder.bind(f"\0nanoslime-ports-{address}-{start}")
            ports = list(range(start, start + count))
            if all(_is_free(address, port) for port in ports):
                return ports, holder
        holder.close()
    raise RunError(f"no {count} free ports on {address} from {first} to {end}")


def answers(address: str, port: int) -> bool:
    """Whether somebody accepts connections at this address and port."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((address, port)) == 0


def _is_free(address: str, port: int) -> bool:
    """Whether nobody has bound the port, neither at `address` nor on all addresses."""
    for place in (address, ""):
        with socket.socket() as probe:
            try:
                probe.bind((place, port))
            except OSError:
                return False
    return True
