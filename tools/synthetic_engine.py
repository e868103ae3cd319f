"""A process that takes weights as SGLang with our plug-in does, and throws them away: it joins
process groups, receives buckets, checks their seals, and speaks those HTTP calls of a sync.
bench_weight_sync.py measures our side with it.
"""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import prod
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from nanoslime.process_groups import join_group, one_ahead
from nanoslime.rollout.engines.sglang_client import SGLangEngine
from nanoslime.sealed_bucket import HEADER, Place, broken_seal, place_of
from nanoslime.types import WeightGroup

HOST = "127.0.0.1"
DEADLINE_S = 120.0


class Receiver:
    """What an engine knows of its weights. A method has the name of its HTTP call."""

    def __init__(self) -> None:
        self.groups: dict[str, dist.ProcessGroup] = {}
        self.last: Place | None = None
        self.version = "0"
        self.num_bytes = 0

    def init_weights_update_group(self, body: dict[str, Any]) -> str:
        store = dist.TCPStore(body["master_address"], body["master_port"], is_master=False)
        group = WeightGroup(
            body["group_name"],
            body["master_address"],
            body["master_port"],
            body["world_size"],
            body["backend"],
        )
        self.groups[group.name] = join_group(store, group, body["rank_offset"], DEADLINE_S)
        return "joined"

    def destroy_weights_update_group(self, body: dict[str, Any]) -> str:
        for name in [name for name in self.groups if name.startswith(body["group_name"])]:
            dist.destroy_process_group(self.groups.pop(name))
        return "left"

    def weights_checker(self, body: dict[str, Any]) -> str:
        return "0 tensors agreed"

    def begin_weight_update(self, body: dict[str, Any]) -> str:
        self.last = None
        return "0 tensors expected"

    def update_weights_from_distributed(self, body: dict[str, Any]) -> str:
        sizes: list[int] = []
        for name, dtype, shape in zip(body["names"], body["dtypes"], body["shapes"], strict=True):
            if name == HEADER:
                sizes.append(0)
            sizes[-1] += getattr(torch, dtype).itemsize * prod(shape)
        group = self.groups[body["group_name"]]
        for flat in one_ahead([partial(self._receive, size, group) for size in sizes]):
            problem = broken_seal(flat, self.last)
            if problem:
                raise ValueError(problem)
            self.last = place_of(flat)
            self.num_bytes += flat.nbytes
        return "received"

    def receive_bare(self, body: dict[str, Any]) -> str:
        """Broadcasts of so many bytes each, in the group of trainer rank 0."""
        [group] = [group for name, group in self.groups.items() if name.endswith("-0")]
        for num_bytes in body["sizes"]:
            self._receive(num_bytes, group)
        return "received"

    def end_weight_update(self, body: dict[str, Any]) -> str:
        assert self.last is not None and self.last.number + 1 == self.last.num_buckets
        return f"version {self.last.version}"

    def update_weight_version(self, body: dict[str, Any]) -> str:
        self.version = body["new_version"]
        return "labelled"

    def update_weights_from_disk(self, body: dict[str, Any]) -> str:
        self.version = body["weight_version"]
        return "0 tensors checked"

    def counts(self, body: dict[str, Any]) -> str:
        """Bytes that came in buckets so far, and seconds of processor time."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        return json.dumps([self.num_bytes, used.ru_utime + used.ru_stime])

    def nothing(self, body: dict[str, Any]) -> str:
        """/pause_generation and the like: nothing is generated here."""
        return "done"

    def _receive(self, num_bytes: int, group: dist.ProcessGroup) -> torch.Tensor:
        """Into new memory, as in SGLang."""
        flat = torch.empty(num_bytes, dtype=torch.uint8)
        dist.broadcast(flat, group_src=0, group=group)
        return flat


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            act = getattr(receiver, self.path.strip("/"), receiver.nothing)
            try:
                answer = {"success": True, "message": act(body)}
            except (RuntimeError, ValueError, LookupError) as e:
                answer = {"success": False, "message": f"{type(e).__name__}: {e}"}
            self._answer(answer)

        def do_GET(self) -> None:
            self._answer({"weight_version": receiver.version})

        def log_message(self, *arguments: object) -> None: ...

        def _answer(self, content: dict[str, Any]) -> None:
            data = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer((HOST, 0), Handler)
    pipe.send(server.server_port)
    server.serve_forever()


@contextmanager
def synthetic_engines(number: int, context: Any) -> Iterator[list[SGLangEngine]]:
    """Clients of so many processes, which a context of multiprocessing makes; they end with this
    one.
    """
    processes = []
    engines = []
    try:
        for index in range(number):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            processes.append(process)
            url = f"http://{HOST}:{ours.recv()}"
            engine = SGLangEngine(
                name=f"synthetic-{index}",
                url=url,
                log="",
                vocab_size=1,
                experts_of=None,
                world_size=1,
                request_deadline_s=DEADLINE_S,
                control_deadline_s=DEADLINE_S,
            )
            engines.append(engine)
        yield engines
    finally:
        for process in processes:
            process.kill()
            process.join()
