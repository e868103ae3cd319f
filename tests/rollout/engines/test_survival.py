"""Servers that do not come up, that die, or whose owner dies: one line with the cause,
no process left.

One of these tests kills the session's SGLang server; whoever needs it next starts it
again.
"""

import asyncio
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanoslime.config import RolloutConfig, RunConfig
from nanoslime.engine_kind import EngineStart
from nanoslime.processes.child import ChildProcess
from nanoslime.processes.ports import free_port
from nanoslime.rollout.engines.sglang_client import SGLangEngine
from nanoslime.rollout.engines.sglang_server import SGLangServer
from nanoslime.rollout.router import Router
from nanoslime.types import GenerateRequest, Generation, RequestFailed, RunError
from tests import process_table
from tests.processes.programs import STUBBORN
from tests.rollout.engines.fake_sglang import FakeSGLang, fine, serving
from tests.serving import ServerOwner, make_server, num_running, wait_until_running


def fake_server(model: Path, log: Path, program: str) -> SGLangServer:
    server = make_server(model, log, free_port("127.0.0.1"), index=3)
    server.command = [sys.executable, "-c", program]
    return server


def test_a_server_that_never_answers(tiny_model: Path, tmp_path: Path, no_leftovers: None) -> None:
    server = fake_server(tiny_model, tmp_path / "engine-3.log", STUBBORN)
    message = (
        r"engine engine-3 was not up after 2 s "
        r"\(awaited: 200 from http://127.0.0.1:\d+/health\); "
        r"log: .*engine-3.log; last line: loading shards$"
    )
    with pytest.raises(RunError, match=message):
        server.start(deadline_s=2)
    assert not server.process.alive()
    server.close()


def test_a_server_that_exits(tiny_model: Path, tmp_path: Path, no_leftovers: None) -> None:
    program = "import sys; print('no such option'); sys.exit(3)"
    server = fake_server(tiny_model, tmp_path / "e.log", program)
    message = r"engine-3 exited with status 3 before .*log: .*e.log; last line: no such opt"
    start = time.monotonic()
    with pytest.raises(RunError, match=message):
        server.start(deadline_s=60)
    assert time.monotonic() - start < 30


def test_command_and_options(tiny_model: Path, tmp_path: Path) -> None:
    server = make_server(
        tiny_model,
        tmp_path / "e.log",
        1234,
        disable_overlap_schedule=False,
        chunked_prefill_size=64,
        served_model_name="a b",
    )
    flags = " ".join(server.command)
    assert "--chunked-prefill-size 64" in flags
    assert "--max-total-tokens 8192" in flags
    assert "--weight-version 0" in flags
    assert "--disable-overlap-schedule" not in flags
    assert server.command[-1] == "a b"


def test_a_cpu_server_gets_stubs_and_only_the_model_files_it_needs(
    tiny_model: Path, tmp_path: Path
) -> None:
    server = make_server(tiny_model, tmp_path / "e.log", 1234)
    assert "sglang_stubs" in server.env["PYTHONPATH"]
    assert "OMP_NUM_THREADS" in server.env
    skipped = server.env["SGLANG_DISABLED_MODEL_ARCHS"].split(",")
    assert "deepseek_v2" in skipped
    assert not {"qwen3", "llama", "utils"} & set(skipped)


def test_an_option_that_is_set_elsewhere_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="rollout.sglang.device is set by nanoslime itself"):
        make_server(tiny_model, tmp_path / "e.log", 1234, device="cuda")


def test_no_stubs_on_cuda(tiny_model: Path, tmp_path: Path) -> None:
    config = RunConfig(seed=7, rollout=RolloutConfig(engine_tp_size=2))
    log = tmp_path / "e.log"
    start = EngineStart(
        config, 0, tiny_model, device="cuda", host="10.0.0.1", log=log, gpu_ids=(2, 3)
    )
    server = SGLangServer(start, 1234)
    flags = " ".join(server.command)
    assert "--device cuda --tp-size 2 --weight-version 0 --dtype bfloat16" in flags
    assert "--random-seed 7000" in flags
    assert "torch_native" not in flags
    assert "sglang_stubs" not in server.env.get("PYTHONPATH", "")
    assert "--enable-fp32-lm-head" in flags
    assert server.env["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert "SGLANG_USE_CPU_ENGINE" not in server.env


def generate(engine: SGLangEngine, max_new_tokens: int) -> list[Generation]:
    request = GenerateRequest([5], n=1, max_new_tokens=max_new_tokens, temperature=1.0)
    return asyncio.run(engine.generate(request))


@pytest.mark.sglang
def test_no_part_of_a_real_server_survives_its_owner(
    sglang_engine: SGLangEngine, doomed_server: ServerOwner, no_leftovers: None
) -> None:
    """The owner is killed while requests run; their error names the lost engine. One that came
    by a router is answered by another engine.
    """
    group = doomed_server.server_pid
    assert sglang_engine.health()
    # HTTP server, scheduler, detokenizer.
    assert len(process_table.process_group(group)) >= 3
    lost = "engine engine-0 at http.*: /generate failed: .*; log: .*engine-0.log; last"
    routers: list[Router] = []

    async def routed(other: SGLangEngine) -> list[Generation]:
        routers.append(Router([sglang_engine]))
        request = GenerateRequest([6], n=1, max_new_tokens=4000, temperature=1.0)
        answer = asyncio.create_task(routers[0].generate(request))
        await asyncio.sleep(0)
        routers[0].set_engines([sglang_engine, other])
        return await answer

    with serving(FakeSGLang(lambda number: fine()), "engine-1") as other:
        with ThreadPoolExecutor(max_workers=2) as threads:
            running = threads.submit(generate, sglang_engine, max_new_tokens=4000)
            by_router = threads.submit(lambda: asyncio.run(routed(other)))
            wait_until_running(sglang_engine)
            process_table.wait_for(lambda: num_running(sglang_engine) == 2, timeout_s=20)
            doomed_server.kill()
            with pytest.raises(RequestFailed, match=lost):
                running.result(60)
            assert by_router.result(60)[0].token_ids == [7]
    assert "engine-0" in routers[0].lost["engine-0"]
    process_table.wait_for(lambda: not process_table.process_group(group), timeout_s=5)
    assert process_table.process_group(group) == []
    with pytest.raises(RunError, match=r"engine-0 .*/pause_generation failed: ConnectionError"):
        sglang_engine.pause()
    assert not sglang_engine.health()


SLOW = """
import http.server, sys, time

class Slow(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        time.sleep(30)

http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Slow).serve_forever()
"""


def test_an_engine_that_does_not_answer_in_time_is_lost(tmp_path: Path, no_leftovers: None) -> None:
    port = free_port("127.0.0.1")
    log = tmp_path / "slow.log"
    child = ChildProcess("slow", [sys.executable, "-c", SLOW, str(port)], os.environ, log)
    engine = SGLangEngine(
        name="engine-1",
        url=f"http://127.0.0.1:{port}",
        log=str(log),
        vocab_size=10,
        request_deadline_s=0.5,
        control_deadline_s=0.5,
    )
    child.wait_until(engine.health, "200", 20)
    late = r"engine-1 .*/generate was not answered within 0.5 s; log: .*slow.log"
    with pytest.raises(RequestFailed, match=late):
        generate(engine, max_new_tokens=1)
    with pytest.raises(
        RunError, match=r"engine-1 .*/continue_generation was not answered within 0.5 s"
    ):
        engine.resume()
    child.close()
