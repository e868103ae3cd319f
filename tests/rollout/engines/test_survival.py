"""Servers that do not come up, that die, or whose owner dies: the cause in one line, and no process left.

The last file of the folder: one of its tests kills the session's SGLang server.
"""

import asyncio
import os
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from nanoslime.config.rollout import RolloutConfig
from nanoslime.processes.child import ChildProcess
from nanoslime.processes.ports import free_port
from nanoslime.rollout.engines.sglang_client import SGLangEngine
from nanoslime.rollout.engines.sglang_server import SGLangServer
from nanoslime.types import EngineLost, GenerateRequest, RunError
from tests import process_table
from tests.processes.programs import STUBBORN
from tests.serving import ServerOwner, make_server


def fake_server(model: Path, log: Path, program: str) -> SGLangServer:
    server = make_server(model, log, free_port("127.0.0.1"), name="engine-3")
    server.command = [sys.executable, "-c", program]
    return server


def test_a_server_that_never_answers(tiny_model: Path, tmp_path: Path, no_leftovers: None) -> None:
    server = fake_server(tiny_model, tmp_path / "engine-3.log", STUBBORN)
    awaited = (
        r"engine engine-3 was not up after 2 s \(awaited: 200 from http://127.0.0.1:\d+/health\); "
    )
    with pytest.raises(
        RunError, match=awaited + r"log: .*engine-3.log; last line: loading shards$"
    ):
        server.start(deadline_s=2)
    assert not server.process.alive()
    server.close()


def test_a_server_that_exits(tiny_model: Path, tmp_path: Path, no_leftovers: None) -> None:
    server = fake_server(
        tiny_model, tmp_path / "e.log", "import sys; print('no such option'); sys.exit(3)"
    )
    start = time.monotonic()
    with pytest.raises(
        RunError,
        match=r"engine-3 exited with status 3 before .*log: .*e.log; last line: no such opt",
    ):
        server.start(deadline_s=60)
    assert time.monotonic() - start < 30


def test_a_taken_port(tiny_model: Path, tmp_path: Path, no_leftovers: None) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        server = make_server(tiny_model, tmp_path / "e.log", port)
        with pytest.raises(
            RunError,
            match=f"engine engine-0: port {port} on 127.0.0.1 cannot be used .*another port",
        ):
            server.start(deadline_s=5)
    assert server.process is None


def test_command_and_options(tiny_model: Path, tmp_path: Path) -> None:
    options = {
        "disable_overlap_schedule": False,
        "chunked_prefill_size": 64,
        "served_model_name": "a b",
    }
    server = make_server(tiny_model, tmp_path / "e.log", 1234, **options)
    flags = " ".join(server.command)
    assert "--chunked-prefill-size 64" in flags and "--max-total-tokens 8192" in flags
    assert "--weight-version 0" in flags and "--disable-overlap-schedule" not in flags
    assert server.command[-1] == "a b"
    assert "sglang_stubs" in server.env["PYTHONPATH"] and "OMP_NUM_THREADS" in server.env
    skipped = server.env["SGLANG_DISABLED_MODEL_ARCHS"].split(",")
    assert "deepseek_v2" in skipped and not {"qwen3", "llama", "utils"} & set(skipped)
    with pytest.raises(RunError, match="rollout.sglang.device is set by nanoslime itself"):
        make_server(tiny_model, tmp_path / "e.log", 1234, device="cuda")


def test_no_stubs_on_cuda(tiny_model: Path, tmp_path: Path) -> None:
    server = SGLangServer(
        name="engine-0",
        model_path=str(tiny_model),
        config=RolloutConfig(engine_tp_size=2),
        dtype="bfloat16",
        device="cuda",
        host="10.0.0.1",
        port=1234,
        log=tmp_path / "e.log",
        seed=7,
        gpu_ids=(2, 3),
    )
    flags = " ".join(server.command)
    assert "--device cuda --tp-size 2 --weight-version 0 --dtype bfloat16 --random-seed 7" in flags
    assert "torch_native" not in flags and "sglang_stubs" not in server.env.get("PYTHONPATH", "")
    assert server.env["CUDA_VISIBLE_DEVICES"] == "2,3" and "SGLANG_USE_CPU_ENGINE" not in server.env


@pytest.mark.sglang
def test_no_part_of_a_real_server_survives_its_owner(
    sglang_engine: SGLangEngine, shared_server: ServerOwner, no_leftovers: None
) -> None:
    """The owner is killed while a request runs; whoever waits for the request learns which engine is lost."""
    pid = shared_server.server_pid
    assert (
        sglang_engine.health() and len(process_table.process_group(pid)) >= 3
    )  # HTTP server, scheduler, detokenizer
    threading.Timer(1.0, shared_server.kill).start()
    request = GenerateRequest([5], n=1, max_new_tokens=4000, temperature=1.0)
    with pytest.raises(
        EngineLost,
        match="engine engine-0 at http.*: /generate failed: .*; log: .*engine-0.log; last",
    ):
        asyncio.run(sglang_engine.generate(request))
    assert process_table.wait_for(lambda: not process_table.process_group(pid), timeout_s=5), (
        process_table.process_group(pid)
    )
    with pytest.raises(RunError, match=r"engine-0 .*/pause_generation failed: ConnectionError"):
        sglang_engine.pause()
    assert not sglang_engine.health()


SLOW = """
import http.server, time
class Slow(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def do_POST(self):
        time.sleep(30)
import sys
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Slow).serve_forever()
"""


def test_an_engine_that_does_not_answer_in_time_is_lost(tmp_path: Path, no_leftovers: None) -> None:
    port = free_port("127.0.0.1")
    child = ChildProcess(
        "slow", [sys.executable, "-c", SLOW, str(port)], os.environ, tmp_path / "slow.log"
    )
    engine = SGLangEngine(
        name="engine-1",
        url=f"http://127.0.0.1:{port}",
        log=str(tmp_path / "slow.log"),
        vocab_size=10,
        request_deadline_s=0.5,
        control_deadline_s=0.5,
    )
    child.wait_until(engine.health, "200", 20)
    with pytest.raises(
        EngineLost, match=r"engine-1 .*/generate was not answered within 0.5 s; log: .*slow.log"
    ):
        asyncio.run(engine.generate(GenerateRequest([5], n=1, max_new_tokens=1, temperature=1.0)))
    with pytest.raises(
        RunError, match=r"engine-1 .*/continue_generation was not answered within 0.5 s"
    ):
        engine.resume()
    child.close()
