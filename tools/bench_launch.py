"""Where the seconds go from submission to the end of the first step.

    python tools/bench_launch.py [--rounds 3] [FLAG ...]      rehearsals on this machine, one by one
    python tools/bench_launch.py --of RUN_DIR                 a run that there is, also of SLURM

A rehearsal is `jobs/submit_grpo.py --local` with one rollout and no evaluation; flags go to it. All
times are taken from what every run records: provenance.json, attempts/<n>/attempt.json, head.json,
nodes/, phases.jsonl and the time stamps of logs. A stage lasts from the end of the one before it
(of engines and trainers, which start side by side: from the beginning of their phase), so that the
stages that are not indented add up to the whole.

"CPU s" are the processor seconds of everything that the command started, until it ended, by what
the processes are; they are looked at once a second, so that the last one of each is missing. They
say more than seconds do where other work shares the cores: two cores have two of them each second.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median

import psutil

from jobs.checkout import ROOT, environment
from nanoslime.run_dir import Attempt, RunDir
from tools.watch.status import facts, rows

# The phases of the driver in which a first step is made.
_FIRST_STEP = ("generate", "train", "checkpoint", "weight_sync")
_STAMP = re.compile(rb"^\[?(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(?:,(\d{3}))?", re.MULTILINE)
_ENGINE_IS_UP = b"The server is fired up"
# What processes are, by what their command lines hold; the first that fits.
_KINDS = (
    ("sglang", "engines"),
    ("ray::RankActor", "trainer ranks"),
    ("ray::WorkerActor", "rollout workers"),
    ("nanoslime.train", "driver"),
    ("jobs.node", "agents"),
    ("submit_grpo", "submission"),
    ("ray::", "Ray's own"),
    ("/ray", "Ray's own"),
    ("", "others"),
)
_LOOK_S = 1.0
_SMALL = ["--num-rollout", "1", "--eval.interval", "0", "--checkpoint.no-export-hf"]


@dataclass(frozen=True, slots=True)
class Stage:
    name: str
    seconds: float


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--of", type=Path, metavar="RUN_DIR")
    asked, flags = parser.parse_known_args(argv)
    if asked.of is not None:
        run = RunDir.open(asked.of)
        submitted = facts(run.provenance).get("time", 0.0)
        print("\n".join(table([stages(run, submitted)], [])))
        return 0
    found = []
    cpu_s = []
    for number in range(asked.rounds):
        with tempfile.TemporaryDirectory(prefix="bench-launch-") as folder:
            begin = time.time()
            spent = _rehearse(Path(folder), flags)
            whole_s = sum(spent.values())
            [path] = Path(folder).glob("*/attempts")
            found.append(stages(RunDir.open(path.parent), begin))
        cpu_s.append(spent)
        whole = sum(stage.seconds for stage in found[-1] if not stage.name.startswith(" "))
        load = os.getloadavg()[0]
        print(
            f"round {number + 1}: {whole:.1f} s, {whole_s:.0f} CPU s, load {load:.0f}", flush=True
        )
    print("\n".join(table(found, cpu_s)))
    return 0


def _rehearse(root: Path, flags: Sequence[str]) -> dict[str, float]:
    """Runs a rehearsal and returns its processor seconds by kind. SystemExit where it fails."""
    command = [sys.executable, "jobs/submit_grpo.py", "--local", "--run-root", str(root)]
    log = root / "bench.log"
    with log.open("wb") as output:
        rehearsal = subprocess.Popen(
            [*command, *_SMALL, *flags], cwd=ROOT, env=environment(), stdout=output, stderr=output
        )
    # Of each process, by its number and when it began, the kind and the seconds.
    found: dict[tuple[int, float], tuple[str, float]] = {}
    while rehearsal.poll() is None:
        _look(psutil.Process(rehearsal.pid), found)
        time.sleep(_LOOK_S)
    if rehearsal.returncode:
        raise SystemExit(f"the rehearsal failed:\n{log.read_text(errors='replace')[-6000:]}")
    spent: dict[str, float] = {}
    for kind, seconds in found.values():
        spent[kind] = spent.get(kind, 0.0) + seconds
    return spent


def _look(first: psutil.Process, found: dict[tuple[int, float], tuple[str, float]]) -> None:
    """Notes what `first` and all below it have used so far."""
    with suppress(psutil.Error):
        for process in (first, *first.children(recursive=True)):
            with suppress(psutil.Error), process.oneshot():
                times = process.cpu_times()
                command = " ".join(process.cmdline())
                kind = next(kind for mark, kind in _KINDS if mark in command)
                key = (process.pid, process.create_time())
                found[key] = (kind, times.user + times.system)


def stages(run: RunDir, submitted: float) -> list[Stage]:
    """The stages of a run's first attempt; those that it has not reached are missing."""
    attempt = run.attempt(1)
    found = []
    before = submitted
    for name, at in _marks(attempt):
        found.append(Stage(name, at - before))
        if not name.startswith(" "):
            before = at
    return found


def _marks(attempt: Attempt) -> Iterator[tuple[str, float]]:
    """Name and end of each stage, in order; those within the next one are indented."""
    run = attempt.run
    prepared = facts(run.provenance).get("time")
    if prepared:
        yield "submission: plan and run directory", prepared
    yield "allocation: the first agent", attempt.record["started"]
    agent = _stamps(attempt.log("agent", 0))
    if agent:
        yield "agent: imports, checks", agent[0]
    if attempt.head.exists():
        yield "Ray: the head answers", attempt.head.stat().st_mtime
    joined = [file.stat().st_mtime for file in (attempt.path / "nodes").glob("*.json")]
    phases = [line for line in rows(attempt.phases) if {"time", "phase"} <= line.keys()]
    times = {line["phase"]: line["time"] for line in reversed(phases)}
    if joined:
        yield "Ray: all nodes have joined", max(joined)
    if "model" in times:
        yield "driver: imports", times["model"]
    if "start" in times:
        yield "inputs: model files, prompts", times["start"]
    yield from _within_start(attempt)
    work = [line for line in phases if line["phase"] in ("evaluate", *_FIRST_STEP)]
    if work:
        yield "engines and trainers, first weight sync", work[0]["time"]
    step = [line for line in work if line["phase"] != "evaluate"]
    if step and step[0]["time"] > work[0]["time"]:
        yield "first evaluation", step[0]["time"]
    later = [line for line in phases if step and line["time"] > step[0]["time"]]
    ends = [line for line in later if line["step"] > 0 or line["phase"] not in _FIRST_STEP]
    if ends:
        yield "first step", ends[0]["time"]


def _within_start(attempt: Attempt) -> Iterator[tuple[str, float]]:
    """What happens side by side while engines and trainers start."""
    logs = attempt.path / "logs"
    for role, name in (("trainer", "trainer ranks"), ("worker", "rollout workers")):
        files = sorted(logs.glob(f"{role}-*.log"))
        first = [stamps[0] for stamps in map(_stamps, files) if stamps]
        if first:
            yield f"  {name}: their processes have imported", max(first)
    engines = []
    for log in logs.glob("sglang-*.log"):
        text = log.read_bytes()
        at = text.find(_ENGINE_IS_UP)
        if at > 0:
            engines.append(_stamps(log, at)[-1])
    if engines:
        yield "  engines: answer", max(engines)


def _stamps(log: Path, end: int | None = None) -> list[float]:
    """The times that stand at the beginning of lines, up to the byte `end`."""
    if not log.exists():
        return []
    text = log.read_bytes()
    if end is not None:
        text = text[: text.find(b"\n", end)]
    found = []
    for moment, millis in _STAMP.findall(text):
        at = datetime.strptime(moment.decode(), "%Y-%m-%d %H:%M:%S").timestamp()
        found.append(at + int(millis or 0) / 1000)
    return found


def table(rounds: Sequence[Sequence[Stage]], cpu_s: Sequence[Mapping[str, float]]) -> Iterator[str]:
    """Medians over the rounds, as Markdown."""
    yield f"| {len(rounds)} round(s) | s | share |"
    yield "|---|---|---|"
    wholes = []
    for one in rounds:
        wholes.append(sum(stage.seconds for stage in one if not stage.name.startswith(" ")))
    whole = median(wholes)
    for name in dict.fromkeys(stage.name for one in rounds for stage in one):
        seconds = median(s.seconds for one in rounds for s in one if s.name == name)
        share = "" if name.startswith(" ") else f"{seconds / whole:.0%}"
        indent = "&nbsp;&nbsp;" if name.startswith(" ") else ""
        yield f"| {indent}{name.strip()} | {seconds:.1f} | {share} |"
    yield f"| submission to the end of the first step | {whole:.1f} | |"
    if cpu_s:
        whole_s = median(sum(one.values()) for one in cpu_s)
        yield f"| CPU s of the whole rehearsal | {whole_s:.0f} | |"
    for kind in dict.fromkeys(kind for _, kind in _KINDS):
        seconds = [one[kind] for one in cpu_s if kind in one]
        if seconds:
            yield f"| &nbsp;&nbsp;{kind} | {median(seconds):.0f} | |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
