"""The text of a run's job: its sbatch options, its srun step and its batch script.

All functions are pure and tested as text; jobs/slurm_submit.py hands the text to SLURM.
"""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from jobs.checkout import ROOT
from nanoslime.config.cluster import ClusterConfig
from nanoslime.config.run import RunConfig
from nanoslime.layout import Layout

OUTLIVES_STEP = "trap : TERM"
"""The shell line before a run's step: SIGTERM ends the step of a job whose time is up, and not the
script, which then says whether the job goes on.
"""
_CPUS_PER_GPU = 8
# All agents have left so long after the first one.
_WAIT_S = 60
# An option of sbatch with its value; True is an option without a value.
Options = dict[str, str | bool]


def cpus_per_node(config: RunConfig, layout: Layout) -> int:
    """Cores that a job asks for on each node. srun does not inherit them from the job."""
    if config.cluster.cpus_per_node:
        return config.cluster.cpus_per_node
    cpus_per_slot = _CPUS_PER_GPU if layout.device == "cuda" else 1
    return layout.slots_per_node * cpus_per_slot


def common_options(cluster: ClusterConfig, name: str, cpus: int) -> Options:
    """What every job asks for, as sbatch's long options."""
    options: Options = {
        "job-name": name,
        "cpus-per-task": str(cpus),
        "time": str(cluster.time_limit_min),
        "requeue" if cluster.goes_on_by == "requeue" else "no-requeue": True,
        "open-mode": "append",
    }
    options.update(cluster.directives())
    return options


def sbatch_options(config: RunConfig, layout: Layout) -> Options:
    """What a run's job asks for; the cluster file's extra_sbatch has the last word."""
    cluster = config.cluster
    options = common_options(cluster, config.name, cpus_per_node(config, layout))
    options["nodes"] = str(layout.num_nodes)
    options["ntasks-per-node"] = "1"
    options["signal"] = f"USR2@{cluster.signal_lead_s}"
    options.update(gpu_options(cluster, layout))
    if cluster.memory_per_node:
        options["mem"] = cluster.memory_per_node
    if layout.min_nodes < layout.num_nodes:
        options["no-kill"] = True
    options.update(cluster.extra_sbatch)
    return options


def gpu_options(cluster: ClusterConfig, layout: Layout) -> dict[str, str]:
    """How sbatch and srun are asked for the GPUs of a node, in the one way that the site knows."""
    if layout.device != "cuda" or cluster.gpu_request == "none":
        return {}
    option, _, kind = cluster.gpu_request.partition(":")
    return {option: f"{kind}:{layout.slots_per_node}".removeprefix(":")}


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
    if layout.min_nodes < layout.num_nodes:
        # For a task that is dead without SLURM's knowledge srun would wait for ever.
        options += ["--no-kill", f"--wait={_WAIT_S}"]
    if config.cluster.memory_per_node:
        options.append(f"--mem={config.cluster.memory_per_node}")
    for option, value in gpu_options(config.cluster, layout).items():
        options += [f"--{option}={value}", "--gpu-bind=none"]
    return options + config.cluster.srun_options


def setup_lines(config: RunConfig) -> list[str]:
    """Shell lines before the step: modules, site setup, the job's environment, PYTHONPATH."""
    cluster = config.cluster
    lines = []
    if cluster.modules:
        load = shlex.join(["module", "load", *cluster.modules])
        # A shell that is no login shell may not know the command.
        lines = ["type -t module > /dev/null || source /etc/profile", f"{load} || exit 1"]
    lines += cluster.setup
    if cluster.conda:
        activate = f"conda activate {shlex.quote(cluster.conda)}"
        lines += ['eval "$(conda shell.bash hook)"', f"{activate} || exit 1"]
    for name, value in sorted(cluster.variables.items()):
        lines.append(f"export {name}={shlex.quote(value)}")
    lines.append(f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}")
    return lines


def python_of(config: RunConfig) -> str:
    """The Python of the compute nodes: that of cluster.venv, else this one."""
    venv = config.cluster.venv
    if not venv:
        return sys.executable
    return str(Path(venv).expanduser() / "bin" / "python")


def batch_script(options: Mapping[str, str | bool], config: RunConfig, *lines: str) -> str:
    """A batch script that sets up the job and goes on with `lines`; values are quoted."""
    directives = []
    for option, value in options.items():
        if value is True or value == "":
            directives.append(f"#SBATCH --{option}")
        else:
            directives.append(f"#SBATCH --{option}={shlex.quote(str(value))}")
    script = ["#!/bin/bash", *directives, "", *setup_lines(config), *lines]
    return "\n".join(script) + "\n"


def sbatch_text(config: RunConfig, layout: Layout, run_dir: Path, driver: str = "") -> str:
    """The batch script of a run's job. Pure; any path is quoted."""
    options = sbatch_options(config, layout)
    # sbatch takes % for a pattern in this path.
    options["output"] = str(run_dir).replace("%", "%%") + "/slurm-%j.out"
    step = step_command(config, layout, run_dir, driver)
    return batch_script(
        options, config, "", OUTLIVES_STEP, shlex.join(step), requeue_line(config, run_dir, driver)
    )


def step_command(
    config: RunConfig, layout: Layout, run_dir: Path, driver: str, *options: str
) -> list[str]:
    """The srun, with these options beside its own, that runs a node agent on every node."""
    task = [python_of(config), "-m", "jobs.node", str(run_dir)]
    if driver:
        task += ["--driver", driver]
    return ["srun", "--unbuffered", *step_options(config, layout), *options, *task]


def requeue_line(config: RunConfig, run_dir: Path, driver: str) -> str:
    """The shell line after the step: the job goes on, or it says why not, and has the exit code."""
    command = shlex.join([python_of(config), "-m", "jobs.requeue", str(run_dir)])
    return f"{command} $? {shlex.quote(driver)}"


def submitted(job: str, log: str, resume: str) -> str:
    """What to tell the user of a submitted job.

    resume: how to go on with the job; empty where it cannot.
    """
    lines = [
        f"submitted job {job}",
        f"  state   squeue -j {job}",
        f"  follow  tail -F {log}",
        f"  stop    scancel {job}",
    ]
    if resume:
        lines.append(f"  resume  {resume}")
    return "\n".join(lines)
