"""How a run is started: the sbatch text of a job, and the rehearsal, whose node agents are children here.

Text is made by pure functions; jobs/slurm_submit.py hands it to SLURM, by submitit or by sbatch.
"""

import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from jobs.cluster_env import ClusterEnv
from jobs.node import ROOT, handled, remove_scratch, start_agent
from nanoslime.config.cluster import ClusterConfig
from nanoslime.config.run import RunConfig
from nanoslime.layout import Layout
from nanoslime.processes.child import ChildProcess
from nanoslime.processes.tree import adopt_orphans, descendants, end_descendants
from nanoslime.run_dir import FAILED, STOPPED, Attempt, RunDir
from nanoslime.storage.shared_files import seen

_POLL_S = 0.2
_LEAVE_S = 60.0  # patience with agents once the attempt has ended
_CPUS_PER_GPU = 8


def cpus_per_node(config: RunConfig, layout: Layout) -> int:
    """Cores that a job asks for on each node; srun does not inherit it, so the step says it again."""
    per_slot = _CPUS_PER_GPU if layout.device == "cuda" else 1
    return config.cluster.cpus_per_node or layout.slots_per_node * per_slot


def common_options(cluster: ClusterConfig, name: str, cpus: int) -> dict[str, str | bool]:
    """What every job asks for, as sbatch's long options; True is an option without a value."""
    options: dict[str, str | bool] = {"job-name": name, "cpus-per-task": str(cpus)}
    options |= {"time": str(cluster.time_limit_min), "requeue": True, "open-mode": "append"}
    named = ("account", "constraint", "partition", "qos", "reservation")
    return options | {name: getattr(cluster, name) for name in named if getattr(cluster, name)}


def sbatch_options(config: RunConfig, layout: Layout) -> dict[str, str | bool]:
    """What the job of a run asks for."""
    cluster = config.cluster
    options = common_options(cluster, config.name, cpus_per_node(config, layout))
    options |= {"nodes": str(layout.num_nodes), "ntasks-per-node": "1"}
    options["signal"] = f"USR2@{cluster.signal_lead_s}"
    if layout.device == "cuda":
        options["gpus-per-node"] = str(layout.slots_per_node)
    if cluster.memory_per_node:
        options["mem"] = cluster.memory_per_node
    return options | cluster.extra_sbatch


def step_options(config: RunConfig, layout: Layout) -> list[str]:
    """Options of the one srun step that runs a node agent on every node."""
    num = layout.num_nodes
    options = ["--kill-on-bad-exit=1", "--export=ALL", f"--nodes={num}", f"--ntasks={num}"]
    options += ["--ntasks-per-node=1", f"--cpus-per-task={cpus_per_node(config, layout)}"]
    if config.cluster.memory_per_node:
        options.append(f"--mem={config.cluster.memory_per_node}")
    if layout.device == "cuda":
        options += [f"--gpus-per-node={layout.slots_per_node}", "--gpu-bind=none"]
    return options


def setup_lines(config: RunConfig) -> list[str]:
    """Shell lines before the step: the site's own, the job's environment, and where the code is."""
    exports = [
        f"export {name}={shlex.quote(value)}" for name, value in sorted(config.cluster.env.items())
    ]
    code = f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"
    return [*config.cluster.setup, *exports, code]


def python_of(config: RunConfig) -> str:
    """The Python of the compute nodes: that of cluster.venv, else the one that runs this."""
    venv = config.cluster.venv
    return str(Path(venv).expanduser() / "bin" / "python") if venv else sys.executable


def batch_script(options: Mapping[str, str | bool], config: RunConfig, *lines: str) -> str:
    """A batch script that sets up the job and goes on with `lines`. Pure; the options' values are quoted."""
    asked = [
        f"--{k}" if v in (True, "") else f"--{k}={shlex.quote(str(v))}" for k, v in options.items()
    ]
    head = ["#!/bin/bash", *(f"#SBATCH {option}" for option in asked), ""]
    return "\n".join([*head, *setup_lines(config), *lines]) + "\n"


def sbatch_text(config: RunConfig, layout: Layout, run_dir: Path, driver: str = "") -> str:
    """The batch script of a run's job. Pure; any path is quoted."""
    output = str(run_dir).replace("%", "%%") + "/slurm-%j.out"
    task = [
        python_of(config),
        "-m",
        "jobs.node",
        str(run_dir),
        *(["--driver", driver] if driver else []),
    ]
    return batch_script(
        sbatch_options(config, layout) | {"output": output},
        config,
        "",
        shlex.join(["srun", "--unbuffered", *step_options(config, layout), *task]),
        "code=$?",
        f'if [ "$code" -eq {STOPPED} ]; then  # stopped in time: committed, to go on in a new attempt',
        '    scontrol requeue "$SLURM_JOB_ID" && exit 0',
        "fi",
        'exit "$code"',
    )


def submitted(job: str, log: str, resume: str) -> str:
    """What to tell the user of a job that SLURM has taken."""
    ways = {"state": f"squeue -j {job}", "follow": f"tail -F {log}", "stop": f"scancel {job}"}
    ways |= {"resume": resume} if resume else {}
    told = [f"  {what:7} {command}" for what, command in ways.items()]
    return "\n".join([f"submitted job {job}", *told])


def run_local(config: RunConfig, layout: Layout, run: RunDir, driver: str = "") -> int:
    """A rehearsal: one agent per simulated node as a child, the driver's lines on stdout. Returns the code.

    Ctrl-C asks the driver to commit and stop; a second one ends it at once. What failed goes to stderr.
    """
    others = descendants(os.getpid())
    adopt_orphans()
    nodes = [
        ClusterEnv.for_local(i, layout.num_nodes, f"l{os.getpid()}")
        for i in range(layout.num_nodes)
    ]
    attempt = run.new_attempt(nodes[0].attempt_key)
    signals: list[signal.Signals] = []
    with handled(signals.append):
        try:
            _supervise(
                attempt, [start_agent(attempt, config, env, driver) for env in nodes], signals
            )
        finally:
            end_descendants(others)
            for env in nodes:
                remove_scratch(env.scratch(attempt.path))
    code, reason = attempt.ended() or (FAILED, "the agents ended without saying why")
    if code:
        print(
            f"{'stopped' if code == STOPPED else 'failed'}: {reason}", file=sys.stderr, flush=True
        )
    return code


def _supervise(attempt: Attempt, agents: list[ChildProcess], signals: list[signal.Signals]) -> None:
    """Until all agents have ended: show the driver's lines, hand signals on, report a killed agent."""
    stream: BinaryIO | None = None
    alive, asked, gone, leave_by = True, False, set[int](), float("inf")
    while alive:
        alive = any(agent.poll() is None for agent in agents)
        stream = _copy_new_lines(attempt.log("driver", 0), stream)
        while signals:
            sig = signals.pop(0)
            if asked or sig == signal.SIGTERM:
                for agent in agents:
                    agent.send_signal(signal.SIGTERM)
            else:
                attempt.request_stop("Ctrl-C" if sig == signal.SIGINT else sig.name)
                print(
                    "stopping after this step; once more ends it at once",
                    file=sys.stderr,
                    flush=True,
                )
            asked = True
        for node, agent in enumerate(agents):
            if agent.poll() and node not in gone:
                gone.add(node)
                if attempt.ended() is None:
                    attempt.end(FAILED, agent.exit_summary())
                attempt.leave(node)
        if attempt.ended() is not None:
            leave_by = min(leave_by, time.monotonic() + _LEAVE_S)
        if time.monotonic() > leave_by:
            return
        if alive:
            time.sleep(_POLL_S)


def _copy_new_lines(log: Path, stream: BinaryIO | None) -> BinaryIO | None:
    """Copy what was appended to `log` to stdout; returns the open file, None while there is none."""
    if stream is None and seen(log):
        stream = open(log, "rb")
    while stream and (block := stream.read(65536)):
        sys.stdout.write(block.decode(errors="replace"))
    sys.stdout.flush()
    return stream
