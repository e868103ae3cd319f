"""What the training loop costs over its two halves, on the tiny model through real SGLang.

    python tools/bench_loop.py [--rollouts 15] [--prompts 64] [--staleness 0 1]
        [--rounds 3] [--run-root DIR] [FLAG ...]

Of each staleness, and in turn in each round:

loop: `python -m nanoslime.train --mock --engine sglang`, as a process. A step is the time from
    one line "step k/n" of its log to the next: sampling, rewards, training, weight sync,
    recording, metrics.
bare: an SGLang server with the same options and nothing else. A plain client sends it the
    prompts of the recorded rollouts, one rollout after the other, all requests of one at once.
    "by sample" sends a request for each sample, "by group" one with n for each prompt.
train only: `--load-rollouts` of the loop's recording; a step is its seconds of planning,
    fetching and training, without those of reading the files.

The table has medians over the steps of all rounds, without the first two of each run. The ratio
is that of a step of the loop to the sum of the two halves (staleness 0), or to the larger one.
Every process computes on one thread, and SGLang on a core of its own, so that the halves can run
side by side on two cores. Further flags go to the loop and to the replay.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import aiohttp

from nanoslime.config import RunConfig
from nanoslime.config.load import read
from nanoslime.engine_kind import EngineStart
from nanoslime.rollout import recorder
from nanoslime.rollout.engines.sglang_server import SGLangServer
from nanoslime.run_dir import RunDir

NUM_WARM_UP = 2
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
HALVES = ("time/plan_s", "time/fetch_s", "time/logprobs_s", "time/train_s")

Prompts = list[list[int]]


def train(flags: Sequence[str]) -> list[float]:
    """Seconds of each step of a run, by the lines of its log."""
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


def bare(config: RunConfig, model: Path, rollouts: list[Prompts], log: Path) -> dict[str, list]:
    """Seconds of each rollout by the kind of its requests."""
    os.environ["OMP_NUM_THREADS"] = "1"
    start = EngineStart(config, 0, model, device="cpu", host="127.0.0.1", log=log)
    server = SGLangServer(start)
    try:
        engine = server.start(config.rollout.start_deadline_s)
        return asyncio.run(_ask_all(engine.url, config, rollouts))
    finally:
        server.close()


async def _ask_all(url: str, config: RunConfig, rollouts: list[Prompts]) -> dict[str, list]:
    n = config.rollout.n_samples_per_prompt
    seconds: dict[str, list[float]] = defaultdict(list)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, trust_env=False) as session:
        for prompts in rollouts:
            for kind, times, of_one in (("by sample", n, 1), ("by group", 1, n)):
                bodies = [_body(config, prompt, of_one) for prompt in prompts for _ in range(times)]
                begin = time.monotonic()
                await asyncio.gather(*(_ask(session, url, body) for body in bodies))
                seconds[kind].append(time.monotonic() - begin)
                async with session.post(f"{url}/flush_cache") as answer:  # as a weight sync does
                    answer.raise_for_status()
    return seconds


def _body(config: RunConfig, prompt: list[int], n: int) -> dict[str, object]:
    sampling = {"n": n, "max_new_tokens": config.rollout.max_new_tokens, "temperature": 1.0}
    return {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}


async def _ask(session: aiohttp.ClientSession, url: str, body: dict[str, object]) -> None:
    async with session.post(f"{url}/generate", json=body) as answer:
        answer.raise_for_status()
        json.loads(await answer.read())


def replayed(run: RunDir, flags: Sequence[str], name: str, run_root: Path) -> list[float]:
    """Seconds of training of each step, without the engine."""
    replay = ["--load-rollouts", str(run.path), "--name", name, "--run-root", str(run_root)]
    train([*replay, *flags])
    lines = RunDir(run_root / name).metrics.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [sum(row.get(half, 0.0) for half in HALVES) for row in rows if "train/loss" in row]


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
    log = run_root / f"{name}.sglang.log"
    found = bare(read(run.config), run.model / "model", prompts, log)
    for kind, values in found.items():
        seconds[kind] = values[NUM_WARM_UP:]
    seconds["train"] = replayed(run, flags, f"replay-{name}", run_root)[NUM_WARM_UP:]
    return seconds


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=15, help="%(default)s")
    parser.add_argument("--prompts", type=int, default=64, help="a rollout; %(default)s")
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1], help="0 1")
    parser.add_argument("--rounds", type=int, default=3, help="%(default)s")
    parser.add_argument("--run-root", type=Path)
    options, more = parser.parse_known_args(argv)
    run_root = options.run_root or Path(tempfile.mkdtemp(prefix="loop-"))
    print(f"runs in {run_root}\n")
    print(
        "| max_staleness | loop s | bare s, by sample | by group | train only s | ratio | phases |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
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
        phases = ", ".join(
            f"{what.removeprefix('time/').removesuffix('_s')} {value:.3f}"
            for what, value in of.items()
            if what.startswith("time/")
        )
        print(
            f"| {staleness} | {of['loop']:.3f} | {of['by sample']:.3f} | {of['by group']:.3f} "
            f"| {of['train']:.3f} | {of['loop'] / bound:.2f} | {phases} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
