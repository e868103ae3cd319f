"""Whatever is stopped or hangs in a run with all its real parts is named, and the run ends.

Each fault comes once a run knows how long its phases take. `-s` shows the seconds and the line.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from nanoslime.run_dir import RunDir
from tests import process_table
from tests.e2e import test_rehearsal
from tests.e2e.test_rehearsal import REPOSITORY, Rehearsal

pytestmark = [
    pytest.mark.matrix,
    pytest.mark.ray,
    pytest.mark.megatron,
    pytest.mark.timeout(600),
]
start = test_rehearsal.start  # the fixture
FLOOR_S = 15.0
# An engine is lost when it has been silent for so long, which the default deadline leaves time for.
PATIENT = """--nodes 2 --num-rollout 1000 --eval.max-prompts 8 --save-interval 1
    --cluster.hang-factor 4""".split()
SMALL = [*PATIENT, "--cluster.hang-floor-s", str(FLOOR_S)]
EMBEDDED = [*SMALL, "--engine", "embedded"]
# A step is known when its phases have been gone through three times.
KNOWN_AT = "step 5/1000"
DEADLINE = re.compile(r"is in phase (\S+) for (\d+) s, and may be for (\d+) s")


def stop(rehearsal: Rehearsal, pattern: str, role: str, rank: int) -> None:
    """Stops the actor whose own log tells its process by `pattern`."""
    [pid] = re.findall(pattern, rehearsal.run.attempt(1).log(role, rank).read_text())
    os.kill(int(pid), signal.SIGSTOP)


def stop_rank_1(rehearsal: Rehearsal) -> None:
    stop(rehearsal, r"trainer rank 1 of .* pid (\d+)", "trainer", 1)


def stop_driver(rehearsal: Rehearsal) -> None:
    os.kill(rehearsal.pid_of("nanoslime.train", "--attempt"), signal.SIGSTOP)


def stop_agent_1(rehearsal: Rehearsal) -> None:
    os.kill(rehearsal.pid_of("jobs.node", "--local-node 1"), signal.SIGSTOP)


def block_checkpoint(rehearsal: Rehearsal) -> None:
    """The next file driver.json of a checkpoint is a FIFO."""

    def block(run: RunDir) -> None:
        while True:
            for partial in run.checkpoints.glob("step_*.partial"):
                try:
                    os.mkfifo(partial / "driver.json")
                    return
                except OSError:
                    continue

    threading.Thread(target=block, args=(rehearsal.run,), daemon=True).start()


def in_phase(rehearsal: Rehearsal, phase: str) -> None:
    process_table.wait_for(lambda: rehearsal.run.status().get("phase") == phase, 60)


def engine(rehearsal: Rehearsal) -> psutil.Process:
    return psutil.Process(rehearsal.pid_of("sglang.launch_server"))


def stop_engine_in_generate(rehearsal: Rehearsal) -> None:
    in_phase(rehearsal, "generate")
    engine(rehearsal).suspend()


def stop_engine_in_sync(rehearsal: Rehearsal) -> None:
    in_phase(rehearsal, "weight_sync")
    engine(rehearsal).suspend()


def stop_scheduler(rehearsal: Rehearsal) -> None:
    children = engine(rehearsal).children(recursive=True)
    [scheduler] = [one for one in children if "scheduler" in one.name()]
    scheduler.suspend()


def stop_router(rehearsal: Rehearsal) -> None:
    stop(rehearsal, r"rollout worker 0, pid (\d+)", "worker", 0)


def stopped_alone(rehearsal: Rehearsal, fault: Callable, *, node: int, who: str) -> None:
    """The node's agent tells."""
    rehearsal.wait_for_line(KNOWN_AT)
    begin = time.monotonic()
    fault(rehearsal)
    log = rehearsal.run.attempt(1).log("agent", node)
    what = f"{who} on node{node} (pid "
    assert process_table.wait_for(lambda: what in log.read_text(), 30)
    [line] = [line for line in log.read_text().splitlines() if what in line]
    assert "is stopped (T)" in line
    print(f"\n| {fault.__name__} | {time.monotonic() - begin:.0f} s | {line} |", end="")


def check_hang(rehearsal: Rehearsal, fault: Callable, who: str) -> str:
    rehearsal.wait_for_line(KNOWN_AT)
    begin = time.monotonic()
    fault(rehearsal)
    process_table.wait_for(lambda: rehearsal.run.attempt(1).ended() is not None, 240)
    seconds = time.monotonic() - begin
    assert rehearsal.wait(120) == 1, "".join(rehearsal.lines)
    [line] = [line for line in rehearsal.lines if line.startswith("failed:")]
    print(f"\n| {fault.__name__} | {seconds:.0f} s | {line.strip()} |", end="")
    assert who in line
    assert rehearsal.run.status()["phase"] == "failed"
    stacks = rehearsal.run.attempt(1).path / "stacks"
    assert len(list(stacks.iterdir())) >= 1
    return line


def check_deadline(line: str, phase: str) -> None:
    [(found, for_s, limit_s)] = DEADLINE.findall(line)
    assert found == phase
    assert int(for_s) <= 2 * int(limit_s)


@pytest.mark.parametrize(
    ("flags", "fault", "who"),
    [
        (["--pp-size", "1"], stop_driver, "driver-0 on node0 (pid"),
        (["--pp-size", "1"], stop_rank_1, "trainer-1 on node0 (pid"),
        (["--tp-size", "1", "--pp-size", "2"], stop_rank_1, "trainer-1 on node0 (pid"),
        (["--pp-size", "1"], block_checkpoint, "the driver on node0 is in phase checkpoint"),
    ],
)
def test_what_hangs_beside_an_embedded_engine_is_named(start, flags, fault, who):
    line = check_hang(start(*EMBEDDED, *flags), fault, who)
    check_deadline(line, re.findall(r"is in phase (\S+)", line)[0])
    if fault is block_checkpoint:
        assert re.search(r"nanoslime/orchestration/checkpoints.py:\d+ in _commit", line)
    else:
        assert "is stopped (T)" in line


def test_a_stopped_agent_is_named_by_its_silence(start):
    line = check_hang(start(*EMBEDDED, "--pp-size", "1"), stop_agent_1, "no heartbeat from node1")
    [silence_s] = re.findall(r"for (\d+) s", line)
    assert int(silence_s) < 60


@pytest.mark.sglang
@pytest.mark.parametrize(
    ("fault", "who"),
    [
        (stop_engine_in_sync, "sglang-0 on node1 (pid"),
        (stop_router, "worker-0 on node1 (pid"),
    ],
)
def test_what_hangs_beside_sglang_is_named(start, fault, who):
    line = check_hang(start(*SMALL, "--pp-size", "1"), fault, who)
    assert "is stopped (T)" in line
    assert int(DEADLINE.findall(line)[0][1]) <= 2 * int(DEADLINE.findall(line)[0][2])


@pytest.mark.sglang
@pytest.mark.parametrize("fault", [stop_engine_in_generate, stop_scheduler])
def test_an_engine_that_is_stopped_while_it_generates_is_named_and_started_again(start, fault):
    rehearsal = start(*PATIENT, "--pp-size", "1")
    stopped_alone(rehearsal, fault, node=1, who="sglang-0")
    begin = time.monotonic()
    rehearsal.wait_for_line("engine engine-0 is up again", 200)
    print(f" up again after {time.monotonic() - begin:.0f} s |", end="")
    num_lines = len(rehearsal.lines)
    process_table.wait_for(
        lambda: any(line.startswith("step ") for line in rehearsal.lines[num_lines:]), 90
    )
    assert rehearsal.process.poll() is None, "".join(rehearsal.lines)


def named(line: str, who: str) -> None:
    """The line names who hangs, within twice the deadline."""
    assert who in line
    [(_, for_s, limit_s), *_] = DEADLINE.findall(line)
    assert int(for_s) <= 2 * int(limit_s), line


@pytest.fixture
def hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As long as this file is there, the reward HELD does not end."""
    file = tmp_path / "hold"
    monkeypatch.setenv("HELD_REWARD", str(file))
    return file


HELD = ["--reward", "tests.e2e.held_reward:reward"]
ENDLESS = "reward tests.e2e.held_reward:reward on "
IN_REWARD = re.compile(r"at tests/e2e/held_reward.py:\d+ in reward;")


@pytest.mark.parametrize("reward_timeout_s", [4, 600])
def test_an_endless_reward_is_named_also_after_a_requeue(start, hold, reward_timeout_s):
    """The second attempt goes by what the first one has learned; then the run ends."""
    more = f"--pp-size 1 --cluster.max-requeues 1 --data.reward-timeout-s {reward_timeout_s}"
    rehearsal = start(*EMBEDDED, *HELD, *more.split())
    rehearsal.wait_for_line(KNOWN_AT)
    begin = time.monotonic()
    hold.touch()
    assert rehearsal.wait(300) == 1, "".join(rehearsal.lines)
    lines = [line for line in rehearsal.lines if line.startswith("failed:")]
    assert len(lines) == 2
    for line in lines:
        print(f"\n| endless reward ({reward_timeout_s} s) | {line.strip()} |", end="")
        named(line, ENDLESS)
        assert IN_REWARD.search(line)
    print(f" both in {time.monotonic() - begin:.0f} s")
    assert rehearsal.run.latest_attempt().number == 2


class Alone:
    """A run of this machine without agents, in a process of its own."""

    def __init__(self, root: Path, flags: list[str], launcher: list[str]) -> None:
        limits = f"--cluster.hang-floor-s {FLOOR_S} --cluster.hang-factor 4 --num-rollout 1000"
        more = f"--save-interval 1 --cluster.run-root {root} --eval.max-prompts 8 --name alone"
        command = [sys.executable, *launcher, "-m", "nanoslime.train", *flags]
        if "--resume" not in flags:
            command += ["--mock", *limits.split(), *more.split()]
        self.log = root / "output"
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=REPOSITORY)
        self.root = root

    def wait_for(self, text: str) -> None:
        def says_or_ended() -> bool:
            return text in self.log.read_text() or self.process.poll() is not None

        process_table.wait_for(says_or_ended, 240)
        assert text in self.log.read_text(), self.log.read_text()[-3000:]

    def check_end(self, who: str) -> str:
        process_table.wait_for(lambda: self.process.poll() is not None, 180)
        assert self.process.poll() not in (0, None), self.log.read_text()[-3000:]
        status = RunDir.open(self.root / "alone").status()
        assert status["phase"] == "failed"
        line = status["error"]
        print(f"\n| {line} |", end="")
        assert line.startswith("a hang: ")
        named(line, who)
        attempt = RunDir.open(self.root / "alone").latest_attempt()
        assert "File " in (attempt.path / "stacks" / "node-0.txt").read_text()
        return line


@pytest.fixture
def alone(tmp_path: Path, no_leftovers: None) -> Iterator[Callable[..., Alone]]:
    begun = []

    def begin(*flags: str, launcher: str = "") -> Alone:
        begun.append(Alone(tmp_path, list(flags), launcher.split()))
        return begun[-1]

    yield begin
    for run in begun:
        run.process.kill()
        run.process.wait(30)


def test_an_endless_reward_of_a_run_without_agents_is_named_also_when_it_is_resumed(alone, hold):
    run = alone(*HELD)
    run.wait_for(KNOWN_AT)
    hold.touch()
    assert IN_REWARD.search(run.check_end(ENDLESS))
    resumed = alone("--resume", str(run.root / "alone"))
    assert IN_REWARD.search(resumed.check_end(ENDLESS))
    assert RunDir.open(run.root / "alone").latest_attempt().number == 2


@pytest.mark.parametrize(
    ("flags", "launcher", "who"),
    [
        (["--num-gpus", "2", "--cluster.slots-per-node", "2"], "", "trainer-1 on "),
        ([], "-m torch.distributed.run --nproc-per-node 2 --standalone", "trainer rank 1 on "),
    ],
    ids=["ray", "torchrun"],
)
def test_a_stopped_rank_of_a_run_without_agents_is_named(alone, flags, launcher, who):
    run = alone(*flags, "--backend", "fsdp", launcher=launcher)
    run.wait_for(KNOWN_AT)
    family = process_table.descendants(run.process.pid, process_table.all_processes())
    if launcher:
        [pid] = [p.pid for p in family if p.has_env("RANK", "1")]
    else:
        log = RunDir.open(run.root / "alone").attempt(1).log("trainer", 1).read_text()
        [pid] = re.findall(r"trainer rank 1 of .* pid (\d+)", log)
    os.kill(int(pid), signal.SIGSTOP)
    assert "is stopped (T)" in run.check_end(who)


def test_a_stopped_head_of_ray_is_told_and_ends_nothing(start):
    """A raylet is told in the same way; ranks beside it wait for it when they ask for samples."""
    rehearsal = start(*EMBEDDED, "--pp-size", "1")

    def stop_gcs(rehearsal: Rehearsal) -> None:
        os.kill(rehearsal.pid_of("/gcs/gcs_server"), signal.SIGSTOP)

    stopped_alone(rehearsal, stop_gcs, node=0, who="gcs_server")
    num_lines = len(rehearsal.lines)
    process_table.wait_for(lambda: len(rehearsal.lines) > num_lines + 3, 60)
    assert rehearsal.process.poll() is None
    assert rehearsal.run.attempt(1).ended() is None
