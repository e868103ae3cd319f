"""Asks NCCL's RAS threads how a job is: https://docs.nvidia.com/deeplearning/nccl, "RAS".

Since NCCL 2.24 one process of a node listens on localhost:28028, or where NCCL_RAS_ADDR says. It
answers the line `verbose status` by a text about all ranks of all nodes, and closes the connection.
"""

import socket
from collections.abc import Collection, Mapping
from contextlib import suppress

import psutil

_DEFAULT_ADDRESS = "localhost:28028"
# RAS itself waits for 5 s for ranks that do not answer it, and may do so twice.
_DEADLINE_S = 15.0
_CHUNK_BYTES = 1 << 16


def ras_report(pids: Collection[int], environ: Mapping[str, str]) -> str:
    """What RAS says of the job of these processes; empty where none of them listens for it.

    Another job on this node may hold the port, and is not asked. Raises OSError where the
    answer does not come.
    """
    host, _, port = environ.get("NCCL_RAS_ADDR", _DEFAULT_ADDRESS).rpartition(":")
    if not port.isdecimal() or not any(_listens(pid, int(port)) for pid in pids):
        return ""
    chunks = []
    with socket.create_connection((host or "localhost", int(port)), _DEADLINE_S) as connection:
        connection.sendall(b"verbose status\n")
        while chunk := connection.recv(_CHUNK_BYTES):
            chunks.append(chunk)
    return b"".join(chunks).decode(errors="replace")


def _listens(pid: int, port: int) -> bool:
    """Whether this process, which may have ended, accepts connections at the port."""
    with suppress(psutil.Error):
        for connection in psutil.Process(pid).net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                return True
    return False
