"""How long before its end a job is told: by measurement, and within what a partition leaves."""

import json
import shlex
from pathlib import Path

import pytest

from jobs.cluster_env import ClusterEnv, preemption_grace_s
from nanoslime.config.cluster import ClusterConfig
from nanoslime.run_dir import Attempt
from nanoslime.types import RunError
from tests.jobs.made_run import make_run
from tools.submit.inputs import check_times
from tools.submit.lead import longest_phases, with_measured_lead

# As SLURM 22.05 says them.
PARTITIONS = """\
PartitionName=main Default=YES GraceTime=120 OverTimeLimit=NONE PreemptMode=REQUEUE State=UP
PartitionName=calm Default=NO GraceTime=20 OverTimeLimit=NONE PreemptMode=OFF State=UP
PartitionName=rough Default=NO GraceTime=0 OverTimeLimit=NONE PreemptMode=REQUEUE State=UP
"""


def write_phases(attempt: Attempt, *phases: tuple[str, float]) -> None:
    """Each with its seconds."""
    now = 1000.0
    lines = []
    for phase, seconds in phases:
        lines.append(json.dumps({"time": now, "phase": phase, "step": 0}))
        now += seconds
    lines.append(json.dumps({"time": now, "phase": "done", "step": 0}))
    attempt.phases.write_text("\n".join(lines) + "\n")


def test_a_resumed_run_takes_its_lead_from_what_its_last_saves_and_steps_took(
    tmp_path: Path,
) -> None:
    made = make_run(tmp_path, 1, signal_lead_s=333)
    assert with_measured_lead(made.config, made.run) == made.config
    first, second, third = (made.run.new_attempt(f"7-{life}") for life in range(3))
    step = [("generate", 900.0), ("train", 100.0), ("weight_sync", 20.0)]
    write_phases(first, *step, ("checkpoint", 5000.0))
    write_phases(
        second,
        ("start", 70.0),
        *[("generate", 900.0), ("train", 200.0)],
        *[("checkpoint", 30.0), ("weight_sync", 8.0), ("evaluate", 400.0), ("checkpoint", 10.0)],
        *step,
        *[("generate", 7.0), ("checkpoint", 38.0)],
    )
    write_phases(third, ("start", 70.0), ("generate", 5.0))
    lead_s = with_measured_lead(made.config, made.run).cluster.signal_lead_s
    # The save of a step has two parts; half a minute more, as SLURM may be late.
    assert lead_s == 1.5 * (30 + 10) + 200 + 20 + 30


def test_the_saves_of_two_steps_are_not_one(tmp_path: Path) -> None:
    attempt = make_run(tmp_path, 1).run.new_attempt()
    write_phases(attempt, *[("generate", 1.0), ("checkpoint", 6.0)] * 3)
    lines = [json.loads(line) for line in attempt.phases.read_text().splitlines()]
    assert longest_phases(lines) == {"generate": 1.0, "checkpoint": 6.0}


def scontrol(folder: Path, monkeypatch: pytest.MonkeyPatch, job: str = "") -> None:
    """Answers with the partitions, or with a job."""
    program = folder / "scontrol"
    answers = {"partition": PARTITIONS, "job": job, "config": "KillWait = 30 sec"}
    cases = [f"{what}) echo {shlex.quote(text)} ;;" for what, text in answers.items()]
    program.write_text(f'#!/bin/sh\ncase "$2" in\n{chr(10).join(cases)}\nesac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


@pytest.mark.parametrize(
    ("partition", "grace_s"), [("", 120), ("main", 120), ("calm", 0), ("rough", 0), ("absent", 0)]
)
def test_what_a_partition_leaves_to_a_preempted_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partition: str, grace_s: int
) -> None:
    scontrol(tmp_path, monkeypatch)
    assert preemption_grace_s(partition) == grace_s
    cluster = ClusterConfig(partition=partition, signal_lead_s=121)
    if grace_s:
        offer = (
            r"signal_lead_s=121: .* has 120 s .*--checkpoint.every-min 3 --cluster.signal-lead-s"
        )
        with pytest.raises(RunError, match=offer):
            check_times(cluster)
        cluster = ClusterConfig(partition=partition, signal_lead_s=120)
    check_times(cluster)
    monkeypatch.setenv("PATH", "/nowhere")
    assert preemption_grace_s(partition) == 0


@pytest.mark.parametrize(
    ("job", "wait_s"),
    [
        ("PreemptTime=2026-11-28T14:14:29 SuspendTime=None Partition=main", 120.0),
        ("PreemptTime=2026-11-28T14:14:29 SuspendTime=None Partition=rough", 30.0),
        ("PreemptTime=None SuspendTime=None Partition=main", 30.0),
        ("", 30.0),
    ],
)
def test_a_job_that_is_told_to_go_has_the_time_that_slurm_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, wait_s: float
) -> None:
    scontrol(tmp_path, monkeypatch, job)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
    env = ClusterEnv(0, 1, "n1", ("n1",), "127.0.0.1", "7", 0, 1)
    assert env.kill_wait_s() == wait_s


def test_a_driver_has_all_of_a_long_lead_but_a_minute() -> None:
    assert ClusterConfig(signal_lead_s=100).drain_s == 80
    assert ClusterConfig(signal_lead_s=1000).drain_s == 940
