"""What the training loop costs over its two halves, on the tiny model through real SGLang.

    python tools/bench_loop.py [--rollouts 25] [--prompts 64] [--staleness 0 1]
        [--rounds 1] [--run-root DIR] [FLAG ...]

Of each staleness, and in turn in each round:

loop: `python -m nanoslime.train --mock --engine sglang`, as a process. A step is the time from
    one line "step k/n" of its log to the next: sampling, rewards, training, weight sync,
    recording, metrics.
bare: an SGLang server with the same options and nothing else. A plain client sends it the
    prompts of the recorded rollouts, one rollout after the other, all requests of one at once,
    with the parameters that the loop sends. "by sample" sends a request for each sample, as the
    loop does, "by group" one with n for each prompt.
train only: `--load-rollouts` of the loop's recording; a step is its seconds of planning,
    fetching and training, without those of reading the files.
both at once (with staleness): one rollout and one step on this machine at the same time, as two
    independent programs. The bare client asks by sample as long as a replay trains; b is how long
    a rollout takes then and t a step. They share the cores for t seconds, in which t / b of a
    rollout is made, and the rest is made alone: t + (1 - t / b) x bare; t where that is larger.

The table has medians over the steps of all rounds, without the first two of each run. The ratio
is that of a step of the loop to the sum of the two halves (staleness 0), or to the larger one;
the last column is that to both at once. Every process computes on one thread, and SGLang's
scheduler on a core of its own; its other two processes and the client share both cores with the
trainer, so that on two of them the larger half alone is out of reach. Further flags go to the
loop and to the replay.
"""

import asyncio
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import aiohttp
import orjson
from transformers import AutoTokenizer

from nanoslime.config import RunConfig
from nanoslime.config.load import read
from nanoslime.engine_kind import EngineStart
from nanoslime.rollout import recorder
from nanoslime.rollout.engines.sglang_client import SGLangEngine
from nanoslime.rollout.engines.sglang_server import SGLangServer
from nanoslime.run_dir import RunDir

NUM_WARM_UP = 2
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
JSON = {"Content-Type": "application/json"}
HALVES = ("time/plan_s", "time/fetch_s", "time/logprobs_s", "time/train_s")

Prompts = list[list[int]]


def train(flags: Sequence[str], on_step: Callable[[], object] = lambda: None) -> list[float]:
    """Seconds of each step of a run, by the lines of its log; calls `on_step` after each."""
    command = [sys.executable, "-m", "nanoslime.train", "--mock", *flags]
    ends = []
    tail = []
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=ONE_THREAD
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            tail = [*tail[-20:], line]
            if re.match(r"step \d+/\d+ ", line):
                ends.append(time.monotonic())
                on_step()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{''.join(tail)}")
    return [after - before for before, after in zip(ends, ends[1:], strict=False)]


def recorded_prompts(run: RunDir, rollouts: int) -> list[Prompts]:
    """The prompts of each rollout, in token ids."""
    found = []
    for step in range(rollouts):
        prompts = []
        for group in recorder.load(run.rollouts, step):
            sample = group.samples[0]
            prompts.append(sample.token_ids[: int(sample.loss_mask.argmax())].tolist())
        found.append(prompts)
    return found


@contextmanager
def serving(config: RunConfig, model: Path, log: Path) -> Iterator[SGLangEngine]:
    """An SGLang server with the loop's options."""
    os.environ["OMP_NUM_THREADS"] = "1"
    start = EngineStart(config, 0, model, device="cpu", host="127.0.0.1", log=log)
    server = SGLangServer(start)
    try:
        yield server.start(config.rollout.start_deadline_s)
    finally:
        server.close()


@dataclass(frozen=True)
class Client:
    """Sends rollouts to an SGLang server, without anything else of the loop."""

    engine: SGLangEngine
    config: RunConfig
    end_token_ids: list[int]
    rollouts: list[Prompts]

    async def ask_all(self) -> dict[str, list[float]]:
        """Seconds of each rollout by the kind of its requests."""
        seconds: dict[str, list[float]] = defaultdict(list)
        async with self._session() as session:
            for prompts in self.rollouts:
                for kind in ("by sample", "by group"):
                    seconds[kind].append(await self._ask(session, prompts, kind))
        return seconds

    async def ask_while(self, goes_on: Callable[[], bool]) -> list[float]:
        """Seconds of each rollout that began and ended while `goes_on`."""
        seconds = []
        async with self._session() as session:
            for prompts in itertools.cycle(self.rollouts):
                one = await self._ask(session, prompts, "by sample")
                if not goes_on():
                    break
                seconds.append(one)
        return seconds

    def _session(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=0)
        headers = self.engine.authorization()
        return aiohttp.ClientSession(connector=connector, trust_env=False, headers=headers)

    async def _ask(self, session: aiohttp.ClientSession, prompts: Prompts, kind: str) -> float:
        n = self.config.rollout.n_samples_per_prompt
        times, of_one = (n, 1) if kind == "by sample" else (1, n)
        bodies = [self._body(prompt, of_one) for prompt in prompts for _ in range(times)]
        begin = time.monotonic()
        await asyncio.gather(*(self._ask_one(session, body) for body in bodies))
        seconds = time.monotonic() - begin
        async with session.post(
            f"{self.engine.url}/flush_cache"
        ) as answer:  # as a weight sync does
            answer.raise_for_status()
        return seconds

    async def _ask_one(self, session: aiohttp.ClientSession, body: bytes) -> None:
        async with session.post(f"{self.engine.url}/generate", data=body, headers=JSON) as answer:
            answer.raise_for_status()
            orjson.loads(await answer.read())

    def _body(self, prompt: list[int], n: int) -> bytes:
        rollout = self.config.rollout
        sampling = {
            "n": n,
            "max_new_tokens": rollout.max_new_tokens,
            "temperature": rollout.temperature,
            "top_p": rollout.top_p,
            "top_k": rollout.top_k,
            "stop_token_ids": [*rollout.stop_token_ids, *self.end_token_ids],
            "stop": rollout.stop,
            "skip_special_tokens": False,
        }
        body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
        return orjson.dumps(body)


def replayed(
    run: RunDir, flags: Sequence[str], name: str, on_step: Callable[[], object] = lambda: None
) -> list[float]:
    """Seconds of training of each step, without the engine."""
    run_root = run.path.parent
    replay = ["--load-rollouts", str(run.path), "--name", name, "--run-root", str(run_root)]
    train([*replay, *flags], on_step)
    lines = RunDir(run_root / name).metrics.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [sum(row.get(half, 0.0) for half in HALVES) for row in rows if "train/loss" in row]


def at_once(client: Client, run: RunDir, flags: Sequence[str]) -> dict[str, list[float]]:
    """Seconds of rollouts and of steps while both are made."""
    steps: list[float] = []
    with ThreadPoolExecutor(1) as pool:
        name = f"beside-{run.path.name}"
        replay = pool.submit(replayed, run, flags, name, lambda: steps.append(time.monotonic()))
        while not steps and not replay.done():
            time.sleep(0.01)
        num_steps = len(client.rollouts)
        found = asyncio.run(client.ask_while(lambda: len(steps) < num_steps and not replay.done()))
        return {"bare at once": found, "train at once": replay.result()[NUM_WARM_UP:]}


def measure(
    name: str, staleness: int, rollouts: int, run_root: Path, flags: Sequence[str]
) -> dict[str, list[float]]:
    """Seconds of each step by what they are of: loop, bare, train only, phases of the loop."""
    own = ["--engine", "sglang", "--name", name, "--run-root", str(run_root)]
    own += ["--max-staleness", str(staleness)]
    # The last step is left out: its line comes after an evaluation.
    seconds = {"loop": train([*own, *flags])[NUM_WARM_UP:-1]}
    run = RunDir(run_root / name)
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    for phase in rows[-1]:
        if phase.startswith("time/"):
            seconds[phase] = [row[phase] for row in rows[NUM_WARM_UP:]]
    prompts = recorded_prompts(run, rollouts)
    model = run.model / "model"
    config = read(run.config)
    end = AutoTokenizer.from_pretrained(model).eos_token_id
    seconds["train"] = replayed(run, flags, f"replay-{name}")[NUM_WARM_UP:]
    with serving(config, model, run_root / f"{name}.sglang.log") as engine:
        client = Client(engine, config, [] if end is None else [end], prompts)
        for kind, values in asyncio.run(client.ask_all()).items():
            seconds[kind] = values[NUM_WARM_UP:]
        if staleness:
            seconds |= at_once(client, run, flags)
    return seconds


def both_at_once(of: Mapping[str, float]) -> float:
    """Seconds of one rollout and one step, as far as they run side by side."""
    rollout = of["bare at once"]
    step = of["train at once"]
    if step >= rollout:
        return step
    return step + (1 - step / rollout) * of["by sample"]


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=25, help="%(default)s")
    parser.add_argument("--prompts", type=int, default=64, help="a rollout; %(default)s")
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1], help="0 1")
    parser.add_argument("--rounds", type=int, default=1, help="%(default)s")
    parser.add_argument("--run-root", type=Path)
    options, more = parser.parse_known_args(argv)
    run_root = options.run_root or Path(tempfile.mkdtemp(prefix="loop-"))
    print(f"runs in {run_root}\n")
    print(
        "| max_staleness | loop s | bare s, by sample | by group | train only s | both at once s "
        "| ratio | to both at once | phases |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    size = ["--num-rollout", str(options.rollouts), "--rollout-batch-size", str(options.prompts)]
    for staleness in options.staleness:
        seconds: dict[str, list[float]] = defaultdict(list)
        for number in range(options.rounds):
            name = f"loop-{staleness}-{number}"
            measured = measure(name, staleness, options.rollouts, run_root, [*size, *more])
            for what, values in measured.items():
                seconds[what] += values
        of = {what: median(values) for what, values in seconds.items()}
        halves = (of["by sample"], of["train"])
        bound = max(halves) if staleness else sum(halves)
        together = both_at_once(of) if staleness else bound
        phases = ", ".join(
            f"{what.removeprefix('time/').removesuffix('_s')} {value:.3f}"
            for what, value in of.items()
            if what.startswith("time/")
        )
        print(
            f"| {staleness} | {of['loop']:.3f} | {of['by sample']:.3f} | {of['by group']:.3f} "
            f"| {of['train']:.3f} | {together:.3f} | {of['loop'] / bound:.2f} "
            f"| {of['loop'] / together:.2f} | {phases} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
