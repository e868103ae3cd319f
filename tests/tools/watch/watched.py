"""A real run of several attempts, and stand-ins for SLURM's commands."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from nanoslime import train
from nanoslime.orchestration.launch import parse
from nanoslime.orchestration.rollout_manager import RolloutManager
from nanoslime.run_dir import DONE, FAILED, STOPPED, RunDir

_SMALL = "--rollout-batch-size 4 --n-samples-per-prompt 4 --eval.max-prompts 8 --num-rollout 6"


def lived_run(root: Path, model: Path) -> RunDir:
    """Six rollouts, a commit after every second: attempt 1 fails in the fourth, attempt 2 is
    told to stop in the fifth, and attempt 3 ends.
    """
    prompts = root / "prompts.jsonl"
    rows = [{"prompt": f"{number}=", "label": str(number)} for number in range(40)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--mock", *_SMALL.split(), "--run-root", root, "--name", "lived"]
    flags += ["--checkpoint.interval", "2", "--checkpoint.no-export-hf"]
    flags += ["--rehearsal.no-enabled", "--hf-checkpoint", model, "--prompts", prompts]
    flags += [
        "--eval-prompts",
        prompts,
        "--reward",
        "tests.orchestration.rewards:by_text_where_labelled",
    ]
    generate = RolloutManager.generate
    with pytest.MonkeyPatch.context() as patch:

        def failing(manager: RolloutManager, step: int) -> object:
            if step == 3:
                raise OSError("the third rollout is cursed")
            return generate(manager, step)

        patch.setattr(RolloutManager, "generate", failing)
        assert train.main([str(flag) for flag in flags]) == FAILED
    run = RunDir.open(root / "lived")
    launch = parse(["--resume", str(run.path)])
    with pytest.MonkeyPatch.context() as patch:

        def stopping(manager: RolloutManager, step: int) -> object:
            if step == 4:
                launch.attempt.request_stop("a test asked")
            return generate(manager, step)

        patch.setattr(RolloutManager, "generate", stopping)
        assert train.run(launch) == STOPPED
    assert train.main(["--resume", str(run.path)]) == DONE
    return run


def write_phases(run: RunDir, *phases: Sequence[object]) -> None:
    """A new attempt with these phases (name, step, time, and perhaps an error)."""
    attempt = run.new_attempt()
    record = json.loads((attempt.path / "attempt.json").read_text())
    first_time = phases[0][2] if phases else record["started"]
    record |= {"started": first_time, "host": "elsewhere"}
    (attempt.path / "attempt.json").write_text(json.dumps(record))
    lines = [
        json.dumps(dict(zip(("phase", "step", "time", "error"), phase, strict=False)))
        for phase in phases
    ]
    attempt.phases.write_text("\n".join(lines) + "\n")


def stand_in(folder: Path, name: str, script: str) -> Path:
    """A program `name` that keeps its arguments in NAME.calls and goes on with `script`."""
    folder.mkdir(exist_ok=True)
    program = folder / name
    calls = folder / f"{name}.calls"
    program.write_text(f'#!/bin/sh\necho "$@" >> "{calls}"\n{script}\n')
    program.chmod(0o755)
    calls.touch()
    return calls
