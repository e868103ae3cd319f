"""Rollouts beside training, for real in one process: the embedded engine and FSDP. Whatever
stops a run, it goes on with every prompt once and no token beyond the bound.
"""

import asyncio
import json
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from nanoslime import train
from nanoslime.orchestration.launch import Launch, parse
from nanoslime.orchestration.rollout_manager import RolloutManager
from nanoslime.rollout import recorder, worker_state
from nanoslime.rollout.engines.embedded_model import EmbeddedEngine
from nanoslime.run_dir import DONE, STOPPED, RunDir
from nanoslime.types import GenerateRequest, Generation, Status
from nanoslime.weight_sync.engine_pool import EnginePool
from tests import process_table
from tests.orchestration import test_loop
from tests.orchestration.test_loop import losses, rows, run_dir

model = test_loop.model  # the fixture
NUM_ROLLOUT = 6
BATCH = 4
NUM_SAMPLES = 4  # of a group
SETTINGS = f"--num-rollout {NUM_ROLLOUT} --backend fsdp --algorithm.filter-zero-std=false"


@pytest.fixture(scope="module")
def in_turn(tmp_path_factory: pytest.TempPathFactory, model) -> RunDir:
    """A run that takes turns and that nothing stops."""
    root = tmp_path_factory.mktemp("in_turn")
    assert train.main(run_dir(root, "run", model, SETTINGS)) == DONE
    return RunDir.open(root / "run")


def trained_prompts(run: RunDir, max_staleness: int) -> dict[int, int]:
    """The prompt of each group that was trained on, once; no token is beyond the bound."""
    found: dict[int, int] = {}
    for step in range(NUM_ROLLOUT):
        groups = recorder.load(run.rollouts, step)
        assert len(groups) == BATCH
        for group in groups:
            assert group.group_id not in found, "a prompt was trained on twice"
            found[group.group_id] = group.samples[0].metadata["prompt_id"]
            for sample in group.samples:
                for _, version in sample.policy_versions:
                    assert step - max_staleness <= version <= step
    assert [row["step"] for row in rows(run)] == list(range(NUM_ROLLOUT))
    return found


def test_a_stopped_run_goes_on_with_what_was_being_sampled(tmp_path, model, in_turn, monkeypatch):
    """Every prompt is trained on once, in the order of a run that takes turns."""
    max_staleness = 2
    launch = parse(run_dir(tmp_path, "run", model, f"{SETTINGS} --max-staleness {max_staleness}"))
    generate = RolloutManager.generate

    def stopping(self, step):
        groups = generate(self, step)
        if step == 2:
            launch.attempt.request_stop("a test asked")
        return groups

    monkeypatch.setattr(RolloutManager, "generate", stopping)
    assert train.run(launch) == STOPPED
    monkeypatch.undo()
    run = RunDir.open(tmp_path / "run")
    saved = run.checkpoint(3)
    held = json.loads((saved / "driver.json").read_text())["rollout"]["producer"]["admission"]
    assert len(held["oldest"]) == (max_staleness + 1) * BATCH and (saved / "rollout").is_dir()

    assert train.main(["--resume", str(run.path)]) == DONE
    assert trained_prompts(run, max_staleness) == trained_prompts(in_turn, 0)
    ages = [row["rollout/staleness_max"] for row in rows(run)]
    assert 0 < max(ages) <= max_staleness


@dataclass
class Holding:
    """Embedded engines, each request of which stops after three tokens once they are shut,
    until it is interrupted."""

    is_shut: bool = False
    num_held: int = 0
    num_interrupts: int = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        generate = EmbeddedEngine.generate
        interrupt = EmbeddedEngine.interrupt

        async def holding(engine: EmbeddedEngine, request: GenerateRequest) -> list[Generation]:
            if not self.is_shut:
                return await generate(engine, request)
            [start] = await generate(engine, replace(request, max_new_tokens=3))
            if start.status is not Status.TRUNCATED:
                return [start]
            self.num_held += 1
            before = self.num_interrupts
            try:
                while self.num_interrupts == before:
                    await asyncio.sleep(0.005)
            finally:
                self.num_held -= 1
            return [replace(start, status=Status.ABORTED)]

        def interrupted(engine: EmbeddedEngine) -> None:
            interrupt(engine)
            self.num_interrupts += 1

        monkeypatch.setattr(EmbeddedEngine, "generate", holding)
        monkeypatch.setattr(EmbeddedEngine, "interrupt", interrupted)

    def stop_in_a_take(self, launch: Launch, max_staleness: int, monkeypatch) -> None:
        """Asks for a stop while a take waits, which it would do for ever."""
        generate = RolloutManager.generate
        service = EnginePool.service

        def shutting(rollout: RolloutManager, step: int) -> Any:
            self.is_shut = self.is_shut or step == 2
            return generate(rollout, step)

        def stopping(pool: EnginePool, join: Any) -> None:
            service(pool, join)
            if self.num_held > max_staleness * BATCH * NUM_SAMPLES:
                launch.attempt.request_stop("a test asked")

        monkeypatch.setattr(RolloutManager, "generate", shutting)
        monkeypatch.setattr(EnginePool, "service", stopping)


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_a_stop_in_the_middle_of_a_take_keeps_the_tokens_there_are(
    tmp_path, model, in_turn, monkeypatch, max_staleness
):
    """The last finished step is committed with what runs. That goes on; with turns it begins
    anew, and the run is the one that nothing stopped."""
    launch = parse(run_dir(tmp_path, "run", model, f"{SETTINGS} --max-staleness {max_staleness}"))
    holding = Holding()
    holding.install(monkeypatch)
    holding.stop_in_a_take(launch, max_staleness, monkeypatch)
    assert train.run(launch) == STOPPED
    monkeypatch.undo()
    run = RunDir.open(tmp_path / "run")
    step = run.status()["step"]
    assert step >= 2 and [row["step"] for row in rows(run)] == list(range(step))
    saved = worker_state.read(run.checkpoint(step) / "rollout" / "0.npz")
    assert len(saved) == (max_staleness + 1) * BATCH
    starts = {}
    for group in saved:
        for index, rollout in enumerate(group.rollouts):
            if rollout.samples is None:
                [call] = rollout.transcript
                tokens = [*call.token_ids, *call.generation.token_ids]
                starts[group.task.group_id, index] = tokens
                assert len(call.generation.token_ids) >= 3
    assert len(starts) > max_staleness * BATCH * NUM_SAMPLES

    assert train.main(["--resume", str(run.path)]) == DONE
    assert trained_prompts(run, max_staleness) == trained_prompts(in_turn, 0)
    if max_staleness == 0:
        assert losses(run) == losses(in_turn)
    trained = {}
    for number in range(NUM_ROLLOUT):
        for group in recorder.load(run.rollouts, number):
            for index, sample in enumerate(group.samples):
                trained[group.group_id, index] = sample.token_ids.tolist()
    for key, start in starts.items():
        assert trained[key][: len(start)] == start


@pytest.mark.matrix
def test_a_run_that_is_killed_goes_on_from_its_last_checkpoint(
    tmp_path, model, in_turn, no_leftovers
):
    """SIGKILL: what came after the checkpoint is sampled and trained on once more."""
    more = f"{SETTINGS} --max-staleness 2 --save-interval 1"
    flags = run_dir(tmp_path, "run", model, more)
    command = [sys.executable, "-W", "ignore", "-m", "nanoslime.train", *flags]
    with (tmp_path / "log").open("w") as log:
        root = Path(train.__file__).parents[1]
        process = subprocess.Popen(command, cwd=root, stdout=log, stderr=log)
        checkpoint = tmp_path / "run" / "checkpoints" / "step_2"
        process_table.wait_for(lambda: checkpoint.is_dir() or process.poll() is not None, 240)
        process.kill()
        process.wait(30)
    assert process.returncode == -signal.SIGKILL, (tmp_path / "log").read_text()
    run = RunDir.open(tmp_path / "run")
    num_done = len(rows(run))
    assert num_done < NUM_ROLLOUT
    assert train.main(["--resume", str(run.path)]) == DONE
    assert trained_prompts(run, 2) == trained_prompts(in_turn, 0)
