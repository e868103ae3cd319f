"""What another user of the machine can do to a running job, and where its secrets lie.

    python -m tests.strangers < QUESTIONS

answers as that other user, where this one is root and may become somebody else; else as somebody
who lacks the secrets.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import NamedTuple

import grpc
import psutil

_NOBODY = 65534
# A call without effect of each of Ray's services.
_CALLS_OF_RAY = (
    "NodeInfoGcsService/GetAllNodeInfo",
    "NodeManagerService/GetNodeStats",
    "CoreWorkerService/GetCoreWorkerStats",
    "ObjectManagerService/Pull",
    "RayletDriver/ClusterInfo",
)
# It speaks neither HTTP nor gRPC.
UNKNOWN = "unknown"
REFUSED = {"HTTP 401", "Ray UNAUTHENTICATED"}


class Listener(NamedTuple):
    process: str
    address: str
    port: int


def listeners(processes: Iterable[psutil.Process]) -> list[Listener]:
    found = []
    for process in processes:
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                address, port = connection.laddr
                found.append(Listener(" ".join(process.cmdline()), address, port))
    return found


def knock(found: Iterable[Listener]) -> list[tuple[Listener, str]]:
    """How each one answers to a stranger."""
    found = list(found)
    answers = _ask({"listeners": found})["answers"]
    return list(zip(found, answers, strict=True))


def entered(paths: Iterable[Path]) -> list[str]:
    """The directories that a stranger can list."""
    return _ask({"paths": [str(path) for path in paths]})["entered"]


def files_with(secrets: Iterable[str], folders: Iterable[Path]) -> dict[str, int]:
    """The files below the folders that hold one of the secrets, with their permissions."""
    words = [secret.encode() for secret in secrets]
    found = {}
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                content = path.read_bytes()
                if any(word in content for word in words):
                    found[str(path.relative_to(folder))] = path.stat().st_mode & 0o777
    return found


def _ask(questions: dict) -> dict:
    command = [sys.executable, "-m", "tests.strangers"]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[1],
        input=json.dumps(questions),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def main() -> None:
    questions = json.load(sys.stdin)
    _answer(Listener("", "127.0.0.1", 9))  # imports what the other user may not be able to read
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    found = [Listener(*one) for one in questions.get("listeners", ())]
    with ThreadPoolExecutor(64) as threads:
        answers = list(threads.map(_answer, found))
    paths = [path for path in questions.get("paths", ()) if _can_list(path)]
    json.dump({"answers": answers, "entered": paths}, sys.stdout)


def _answer(listener: Listener) -> str:
    host = listener.address.removeprefix("::ffff:")
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    connection = HTTPConnection(host, listener.port, timeout=5)
    try:
        connection.request("POST", "/update_weights_from_disk", '{"model_path": "/tmp"}')
        return f"HTTP {connection.getresponse().status}"
    except TimeoutError:  # Ray would hang up at once
        return UNKNOWN
    except (OSError, HTTPException):
        pass
    finally:
        connection.close()
    told: set[str] = set()
    for method in _CALLS_OF_RAY:
        code = _call(f"{host}:{listener.port}", method)
        if code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
            return UNKNOWN
        told.add(code)
    return f"Ray {' '.join(sorted(told - {'UNIMPLEMENTED'}))}"


def _call(place: str, method: str) -> str:
    with grpc.insecure_channel(place, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(f"/ray.rpc.{method}")(b"", timeout=5)
        except grpc.RpcError as error:
            return error.code().name
    return "OK"


def _can_list(path: str) -> bool:
    try:
        os.listdir(path)
    except PermissionError:
        return False
    return True


if __name__ == "__main__":
    main()
