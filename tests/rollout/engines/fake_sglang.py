"""A small HTTP server that answers as SGLang does where the real one would have to be broken:
with 500, with half a line of JSON, not at all."""

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from nanoslime.rollout.engines.sglang_client import SGLangEngine


def one_sample(version: int = 0, token: int = 7, logprob: float = -0.5) -> dict:
    meta = {
        "id": "1",
        "output_token_logprobs": [[logprob, token, None]],
        "weight_version": str(version),
        "finish_reason": {"type": "length"},
    }
    return {"output_ids": [token], "meta_info": meta}


@dataclass
class FakeSGLang:
    """`plan(number)` says how the request of that number, from 0 on, is answered.

    It is a status with the text of the answer, or one of "hang" and "close".
    """

    plan: Callable[[int], tuple[int, str] | str]
    hangs: bool = False  # it takes connections and never answers, not even /health
    num_requests: int = 0
    num_samples: int = 0
    # It ends the answers that hang.
    over: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def next_answer(self, num_samples: int) -> tuple[int, str] | str:
        with self._lock:
            number = self.num_requests
            self.num_requests += 1
            self.num_samples += num_samples
        return self.plan(number)


def fine(n: int = 1) -> tuple[int, str]:
    return 200, json.dumps([one_sample()] * n)


@contextmanager
def serving(
    fake: FakeSGLang, name: str = "engine-0", deadline_s: float = 30.0
) -> Iterator[SGLangEngine]:
    """The client of the server, which listens until the end of the block."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """The test's output needs no line for each request."""

        def answer(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            if 300 <= status < 400:
                self.send_header("Location", self.path)
            self.end_headers()
            self.wfile.write(text.encode())

        def do_GET(self) -> None:
            if fake.hangs:
                fake.over.wait(30)
            self.answer(200, "")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = fake.next_answer(body["sampling_params"]["n"])
            if answer == "hang":
                fake.over.wait(30)
            if isinstance(answer, str):
                self.close_connection = True
                return
            self.answer(*answer)

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield SGLangEngine(
            name=name,
            url=f"http://127.0.0.1:{server.server_address[1]}",
            log=str(Path("/nonexistent", f"{name}.log")),
            vocab_size=100,
            request_deadline_s=deadline_s,
        )
    finally:
        fake.over.set()
        server.shutdown()
        server.server_close()
        thread.join(5)
