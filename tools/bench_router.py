"""What a router costs a request: ours, the sglang-router wheel, and none, before one SGLang server.

    python tools/bench_router.py [--router-python ENVIRONMENT/bin/python] [--rounds 5] [--small]

The server has the rehearsal's tiny model, on this machine's CPU. A request has 16 tokens and
asks for one, so that nearly all of its time is overhead. The ways take turns, a round each, and
the table has the median and the 90th percentile of all rounds, in milliseconds. The router of
the wheel runs in an environment of its own: `pip install sglang-router==0.3.2`, with the
default policy (cache_aware). The last column is the processor time of a request in the client's
process, where our router runs, too; it says what that costs also where other work makes the times
noise. The last line says what the server itself does in a second.
"""

import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import requests
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from nanoslime.config import ModelConfig, RunConfig
from nanoslime.engine_kind import EngineStart
from nanoslime.models.tiny import tiny_qwen3_config
from nanoslime.processes.ports import free_port
from nanoslime.rehearsal import build_tokenizer
from nanoslime.rollout.engines.sglang_client import SGLangEngine
from nanoslime.rollout.engines.sglang_server import SGLangServer
from nanoslime.rollout.router import Router
from nanoslime.types import GenerateRequest, Generation, RunError

HOST = "127.0.0.1"
CONCURRENCY = (1, 8, 64)
START_S = 280.0
HEADER = """\
| requests at once | way | median ms | more than direct | 90th percentile ms | requests/s | CPU ms |
|---|---|---|---|---|---|---|"""

# Sends one request, which belongs to a key.
Send = Callable[[GenerateRequest, str], Awaitable[list[Generation]]]


def make_model(path: Path) -> Path:
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**tiny_qwen3_config())).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


@contextmanager
def serving(work: Path) -> Iterator[SGLangEngine]:
    config = RunConfig(model=ModelConfig(dtype="float32"))
    model = make_model(work / "model")
    log = work / "engine-0.log"
    server = SGLangServer(EngineStart(config, 0, model, device="cpu", host=HOST, log=log))
    try:
        yield server.start(START_S)
    finally:
        server.close()


@contextmanager
def routing(python: str, engine: SGLangEngine, log: Path) -> Iterator[SGLangEngine]:
    """The sglang-router before the engine, as another engine."""
    port = free_port(HOST)
    command = [python, "-m", "sglang_router.launch_router", "--host", HOST, "--port", str(port)]
    command += ["--worker-urls", engine.url, "--prometheus-port", str(free_port(HOST))]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        routed = replace(engine, name="sglang-router", url=f"http://{HOST}:{port}")
        end = time.monotonic() + 60
        while not _is_up(routed.url):
            if time.monotonic() > end or process.poll() is not None:
                raise RunError(f"sglang-router did not come up; log: {log}")
            time.sleep(0.2)
        yield routed
    finally:
        process.terminate()
        process.wait(20)


def _is_up(url: str) -> bool:
    try:
        return requests.get(f"{url}/readiness", timeout=5).status_code == 200
    except requests.RequestException:
        return False


@dataclass(slots=True)
class Measured:
    """Of all requests of one way at one concurrency."""

    seconds: list[float] = field(default_factory=list)  # of each request
    total_s: float = 0.0
    cpu_s: float = 0.0  # processor time of this process


async def measure(send: Send, concurrency: int, num_requests: int, into: Measured) -> None:
    numbers = iter(range(num_requests))

    async def client() -> None:
        for number in numbers:
            prompt = [5 + (number * 7 + i) % 300 for i in range(16)]
            request = GenerateRequest(prompt, n=1, max_new_tokens=1, temperature=1.0)
            start = time.perf_counter()
            [answer] = await send(request, str(number // 8))
            into.seconds.append(time.perf_counter() - start)
            if len(answer.token_ids) != 1:
                raise RunError(f"a request was not answered: {answer}")

    start = time.perf_counter()
    cpu_start = time.process_time()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    into.total_s += time.perf_counter() - start
    into.cpu_s += time.process_time() - cpu_start


async def compare(ways: dict[str, Send], rounds: int, num_requests: int) -> None:
    print(HEADER, flush=True)
    for concurrency in CONCURRENCY:
        found = {way: Measured() for way in ways}
        for number in range(rounds + 1):
            for way, send in ways.items():
                into = found[way] if number > 0 else Measured()  # the first round warms up
                await measure(send, concurrency, num_requests, into)
        direct = statistics.median(found["direct"].seconds)
        for way, of_way in found.items():
            median = statistics.median(of_way.seconds)
            high = statistics.quantiles(of_way.seconds, n=10)[-1]
            cells = [f"{median * 1e3:.2f}", f"{(median - direct) * 1e3:+.2f}", f"{high * 1e3:.2f}"]
            num_made = len(of_way.seconds)
            cells.append(f"{num_made / of_way.total_s:.0f}")
            cells.append(f"{of_way.cpu_s / num_made * 1e3:.3f}")
            print(f"| {concurrency} | {way} | {' | '.join(cells)} |", flush=True)


async def tokens_per_s(engine: SGLangEngine, num_sequences: int, num_tokens: int) -> float:
    """The engine's speed with so many sequences at once; the best of three."""
    request = GenerateRequest([5, 6, 7], n=1, max_new_tokens=num_tokens, temperature=1.0)
    speeds = []
    for _ in range(3):
        start = time.perf_counter()
        answers = await asyncio.gather(*(engine.generate(request) for _ in range(num_sequences)))
        num_made = sum(len(answer[0].token_ids) for answer in answers)
        speeds.append(num_made / (time.perf_counter() - start))
    return max(speeds)


async def run(engine: SGLangEngine, routed: SGLangEngine | None, options: Namespace) -> None:
    router = Router([engine])
    ways: dict[str, Send] = {
        "direct": lambda request, key: engine.generate(request),
        "nanoslime": router.generate,
    }
    if routed is not None:
        ways["sglang-router"] = lambda request, key: routed.generate(request)
    num_requests = 64 if options.small else 256
    await compare(ways, options.rounds, num_requests)
    num_tokens = 16 if options.small else 256
    for num_sequences in CONCURRENCY:
        speed = await tokens_per_s(engine, num_sequences, num_tokens)
        print(f"{num_sequences} sequences of {num_tokens} tokens at once: {speed:.0f} tokens/s")
    await router.close()


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--router-python", default=sys.executable)
    parser.add_argument("--without-wheel", action="store_true", help="leave out sglang-router")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="few requests, to try the code")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds} measures nothing; give 1 or more")
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engine = stack.enter_context(serving(work))
        routed = None
        if not options.without_wheel:
            log = work / "router.log"
            routed = stack.enter_context(routing(options.router_python, engine, log))
        asyncio.run(run(engine, routed, options))


if __name__ == "__main__":
    main()
