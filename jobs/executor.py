"""How a run is started: the sbatch text of a job, and the rehearsal, whose node agents are children here.

Text is made by pure functions; jobs/slurm_submit.py hands it to SLURM, by submitit or by sbatch.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import BinaryIO

from jobs import children
from jobs.cluster_env import ClusterEnv
from jobs.node import ROOT, handled, remove_scratch
from nanoslime.config.run import RunConfig
from nanoslime.layout import Layout
from nanoslime.run_dir import FAILED, STOPPED, Attempt, RunDir
from nanoslime.storage.shared_files import seen

_POLL_S = 0.2
_LEAVE_S = 60.0  # patience with agents once the attempt has ended
_CPUS_PER_GPU = 8


def cpus_per_node(config: RunConfig, layout: Layout) -> int:
    """Cores that a job asks for on each node; srun does not inherit it, so the step says it again."""
    per_slot = _CPUS_PER_GPU if layout.device == "cuda" else 1
    return config.cluster.cpus_per_node or layout.slots_per_node * per_slot


def sbatch_options(config: RunConfig, layout: Layout) -> dict[str, str | bool]:
    """What the job asks for, as sbatch's long options; True is an option without a value."""
    cluster = config.cluster
    options: dict[str, str | bool] = {
        "job-name": config.name,
        "nodes": str(layout.num_nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(cpus_per_node(config, layout)),
        "time": str(cluster.time_limit_min),
        "signal": f"USR2@{cluster.signal_lead_s}",
        "requeue": True,
        "open-mode": "append",
    }
    if layout.device == "cuda":
        options["gpus-per-node"] = str(layout.slots_per_node)
    named = {"partition", "account", "qos", "constraint", "reservation"}
    options |= {name: getattr(cluster, name) for name in sorted(named) if getattr(cluster, name)}
    if cluster.memory_per_node:
        options["mem"] = cluster.memory_per_node
    return options | cluster.extra_sbatch


def step_options(config: RunConfig, layout: Layout) -> list[str]:
    """Options of the one srun step that runs a node agent on every node."""
    options = [
        "--kill-on-bad-exit=1",
        "--export=ALL",
        f"--nodes={layout.num_nodes}",
        f"--ntasks={layout.num_nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={cpus_per_node(config, layout)}",
    ]
    if config.cluster.memory_per_node:
        options.append(f"--mem={config.cluster.memory_per_node}")
    if layout.device == "cuda":
        options += [f"--gpus-per-node={layout.slots_per_node}", "--gpu-bind=none"]
    return options


def setup_lines(config: RunConfig) -> list[str]:
    """Shell lines before the step: the site's own, the job's environment, and where the code is."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in sorted(config.cluster.env.items())]
    code = f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"
    return [*config.cluster.setup, *exports, code]


def python_of(config: RunConfig) -> Path:
    """The Python of the compute nodes: that of cluster.venv, else the one that runs this."""
    return (
        Path(config.cluster.venv).expanduser() / "bin" / "python"
        if config.cluster.venv
        else Path(sys.executable)
    )


def sbatch_text(config: RunConfig, layout: Layout, run_dir: Path, driver: str = "") -> str:
    """The batch script of the job. Pure; any path is quoted."""
    options = sbatch_options(config, layout)
    options["output"] = str(run_dir).replace("%", "%%") + "/slurm-%j.out"
    task = [
        str(python_of(config)),
        "-m",
        "jobs.node",
        str(run_dir),
        *(["--driver", driver] if driver else []),
    ]
    lines = [
        "#!/bin/bash",
        *(
            f"#SBATCH --{k}" if v is True else f"#SBATCH --{k}={shlex.quote(str(v))}"
            for k, v in options.items()
        ),
        "",
        *setup_lines(config),
        "",
        shlex.join(["srun", "--unbuffered", *step_options(config, layout), *task]),
        "code=$?",
        f'if [ "$code" -eq {STOPPED} ]; then  # stopped in time: committed, to go on in a new attempt',
        '    scontrol requeue "$SLURM_JOB_ID" && exit 0',
        "fi",
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"


def run_local(config: RunConfig, layout: Layout, run: RunDir, driver: str = "") -> int:
    """A rehearsal: one agent per simulated node as a child, the driver's lines on stdout. Returns the code.

    Ctrl-C asks the driver to commit and stop; a second one ends it at once. What failed goes to stderr.
    """
    others = children.descendants(os.getpid())
    children.adopt_orphans()
    job_id = f"l{os.getpid()}"
    attempt = run.new_attempt(f"{job_id}-0")
    environ = {**os.environ, **config.cluster.env}
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    agents = []
    signals: list[signal.Signals] = []
    with handled(signals.append):
        try:
            for node in range(layout.num_nodes):
                command = [sys.executable, "-m", "jobs.node", str(run.path), "--attempt", str(attempt.number)]
                command += ["--local-node", str(node), *(["--driver", driver] if driver else [])]
                name, log = f"the agent of node{node}", attempt.log("agent", node)
                agents.append(children.start(name, command, log, environ, death_signal=signal.SIGTERM))
            _supervise(attempt, agents, signals)
        finally:
            children.end_descendants(others)
            for node in range(layout.num_nodes):
                env = ClusterEnv.for_local(node, layout.num_nodes, job_id)
                remove_scratch(env.scratch(attempt.path))
    code, reason = attempt.ended() or (FAILED, "the agents ended without saying why")
    if code:
        print(f"{'stopped' if code == STOPPED else 'failed'}: {reason}", file=sys.stderr, flush=True)
    return code


def _supervise(attempt: Attempt, agents: list[children.Child], signals: list[signal.Signals]) -> None:
    """Until all agents have ended: show the driver's lines, hand signals on, report a killed agent."""
    stream: BinaryIO | None = None
    ended_at: float | None = None
    asked, gone = False, set[int]()
    alive = True
    while alive:
        alive = any(agent.code() is None for agent in agents)
        stream = _copy_new_lines(attempt.log("driver", 0), stream)
        while signals:
            sig = signals.pop(0)
            if asked or sig == signal.SIGTERM:
                for agent in agents:
                    agent.process.terminate()
            else:
                attempt.request_stop("Ctrl-C" if sig == signal.SIGINT else sig.name)
                print("stopping after this step; once more ends it at once", file=sys.stderr, flush=True)
            asked = True
        for node, agent in enumerate(agents):
            if agent.code() and node not in gone:
                gone.add(node)
                if attempt.ended() is None:
                    attempt.end(FAILED, agent.obituary())
                attempt.leave(node)
        if attempt.ended() is not None:
            ended_at = ended_at or time.monotonic()
            if time.monotonic() - ended_at > _LEAVE_S:
                return
        if alive:
            time.sleep(_POLL_S)


def _copy_new_lines(log: Path, stream: BinaryIO | None) -> BinaryIO | None:
    """Copy what was appended to `log` to stdout; returns the open file, None while there is none."""
    if stream is None:
        if not seen(log):
            return None
        stream = open(log, "rb")
    while block := stream.read(65536):
        sys.stdout.write(block.decode(errors="replace"))
    sys.stdout.flush()
    return stream
