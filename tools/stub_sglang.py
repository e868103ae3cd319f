"""Servers that answer /generate at once as SGLang does, with answers made beforehand; many in a
process. bench_control_plane.py measures what happens to the answers.
"""

import asyncio
import multiprocessing
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from aiohttp import web

from nanoslime.models.shape import ModelShape
from nanoslime.rollout.engines.sglang_client import SGLangEngine

HOST = "127.0.0.1"
NUM_LAYERS, TOPK, NUM_EXPERTS = 48, 8, 128
# A process sends so many answers at once: real ones do not all end at one moment.
MAX_SENDING = 4
NUM_BODIES = 4


@dataclass(frozen=True)
class Sizes:
    """One answer of a stub."""

    num_tokens: int  # prompt and response
    num_prompt_tokens: int
    vocab_size: int
    has_experts: bool
    wide_experts: bool  # int32, as SGLang sends them without our plug-in

    @property
    def num_response_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens


def answer(sizes: Sizes, seed: int) -> tuple[bytes, bytes]:
    """An answer of SGLang before and after the version of the weights."""
    random = np.random.default_rng(seed)
    num_tokens = sizes.num_response_tokens
    token_ids = random.integers(8, sizes.vocab_size, num_tokens).tolist()
    logprobs = (-random.exponential(0.5, num_tokens)).tolist()
    entries = [[logprob, token, None] for logprob, token in zip(logprobs, token_ids, strict=True)]
    meta: dict[str, Any] = {
        "id": "0" * 32,
        "finish_reason": {"type": "length", "length": num_tokens},
        "prompt_tokens": sizes.num_prompt_tokens,
        "weight_version": "VERSION",
        "num_retractions": 0,
        "output_token_logprobs": entries,
        "completion_tokens": num_tokens,
        "cached_tokens": 0,
        "e2e_latency": 1.0,
    }
    if sizes.has_experts:
        shape = (sizes.num_tokens - 1, NUM_LAYERS, TOPK)
        experts = random.integers(0, NUM_EXPERTS, shape, dtype=np.uint8)
        if sizes.wide_experts:
            experts = experts.astype(np.int32)
        meta["routed_experts"] = b64encode(experts.tobytes()).decode()
    text = "word " * (num_tokens // 2)
    body = orjson.dumps({"text": text, "output_ids": token_ids, "meta_info": meta})
    before, after = body.split(b"VERSION")
    return before, after


def serve(sizes: Sizes, num_servers: int, connection: Connection) -> None:
    """Serves, in a process of its own, until the driver says so; tells it the ports."""
    asyncio.run(_serve(sizes, num_servers, connection))


async def _serve(sizes: Sizes, num_servers: int, connection: Connection) -> None:
    bodies = [answer(sizes, seed) for seed in range(NUM_BODIES)]
    version = "0"
    num_answers = 0
    sending = asyncio.Semaphore(MAX_SENDING)

    async def generate(request: web.Request) -> web.StreamResponse:
        nonlocal num_answers
        asked = orjson.loads(await request.read())
        if len(asked["input_ids"]) != sizes.num_prompt_tokens:
            return web.json_response({"error": {"message": "another length"}}, status=400)
        async with sending:
            before, after = bodies[num_answers % NUM_BODIES]
            num_answers += 1
            body = b"".join((before, version.encode(), after))
            response = web.Response(body=body, content_type="application/json")
            await response.prepare(request)
            await response.write_eof()
        return response

    async def update(request: web.Request) -> web.Response:
        nonlocal version
        version = (await request.json())["weight_version"]
        return web.json_response({"success": True, "message": "0 tensors checked."})

    app = web.Application(client_max_size=1 << 26)
    app.router.add_post("/generate", generate)
    app.router.add_post("/update_weights_from_disk", update)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    for _ in range(num_servers):
        await web.TCPSite(runner, HOST, 0).start()
    connection.send([port for _, port in runner.addresses])
    await asyncio.to_thread(connection.recv)
    await runner.cleanup()


@contextmanager
def serving(
    sizes: Sizes, num_engines: int, num_processes: int, shape: ModelShape, log: Path
) -> Iterator[list[SGLangEngine]]:
    """The clients of the stub servers, which are divided among the processes."""
    context = multiprocessing.get_context("spawn")
    ports: list[int] = []
    ends = []
    processes = []
    for number in range(num_processes):
        here, there = context.Pipe()
        num_servers = len(range(number, num_engines, num_processes))
        process = context.Process(target=serve, args=(sizes, num_servers, there), daemon=True)
        process.start()
        ends.append(here)
        processes.append(process)
    try:
        for end in ends:
            if not end.poll(60):
                raise RuntimeError("a process of stub servers did not come up in 60 s")
            ports += end.recv()
        yield [
            SGLangEngine(
                name=f"engine-{number}",
                url=f"http://{HOST}:{port}",
                log=str(log),
                vocab_size=shape.vocab_size,
                experts_of=shape if sizes.has_experts else None,
            )
            for number, port in enumerate(ports)
        ]
    finally:
        for end, process in zip(ends, processes, strict=True):
            end.send("end")
            process.join(20)
