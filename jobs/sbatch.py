"""What a run's job asks SLURM for, and the commands of its batch script.

All functions are pure, and tested as text. tools/submit/batch_script.py makes the script of them;
the job itself needs them where it goes on.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.checkout import module_command
from nanoslime.config.cluster import ClusterConfig
from nanoslime.config.run import RunConfig
from nanoslime.layout import Layout

OUTLIVES_STEP = "trap : TERM"
"""The shell line before a run's step: SIGTERM ends the step of a job whose time is up, and not the
script, which then says whether the job goes on.
"""
_CPUS_PER_GPU = 8
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
    if layout.can_lose_nodes:
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
        f"--kill-on-bad-exit={int(not layout.can_lose_nodes)}",
        "--export=ALL",
        f"--nodes={layout.num_nodes}",
        f"--ntasks={layout.num_nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={cpus_per_node(config, layout)}",
    ]
    if layout.can_lose_nodes:
        # The step outlives the first of its tasks. Node 0 ends it: jobs/node.py.
        options += ["--no-kill", "--wait=0"]
    if config.cluster.memory_per_node:
        options.append(f"--mem={config.cluster.memory_per_node}")
    for option, value in gpu_options(config.cluster, layout).items():
        options += [f"--{option}={value}", "--gpu-bind=none"]
    return options + config.cluster.srun_options


def python_of(config: RunConfig) -> str:
    """The Python of the agents: that of cluster.venv, of the conda environment or the image, else
    this one.
    """
    cluster = config.cluster
    if cluster.venv:
        return str(Path(cluster.venv).expanduser() / "bin" / "python")
    return "python" if cluster.conda or cluster.container != "none" else sys.executable


def python_of_script(config: RunConfig) -> str:
    """The Python of what a batch script runs beside its step, which is in no container."""
    return sys.executable if config.cluster.container != "none" else python_of(config)


def agent_command(config: RunConfig, run_dir: Path, driver: str) -> list[str]:
    """What each task of a run's step runs."""
    task = [*module_command(python_of(config), "jobs.node"), str(run_dir)]
    return [*task, "--driver", driver] if driver else task


def step_command(
    config: RunConfig, layout: Layout, run_dir: Path, task: Sequence[str], *options: str
) -> list[str]:
    """The srun, with these options beside its own, that runs `task` on every node, in the
    container where there is one.
    """
    cluster = config.cluster
    image = cluster.container_image
    mounts = [mount if ":" in mount else f"{mount}:{mount}" for mount in cluster.container_mounts]
    places = [str(run_dir), *(mount.split(":")[1] for mount in mounts)]
    mounts.insert(0, f"{run_dir}:{run_dir}")
    for kept in filter(None, (cluster.local_storage, cluster.caches)):
        if not any(Path(kept).is_relative_to(place) for place in places):
            places.append(kept)
            mounts.append(f"{kept}:{kept}")
    own = []
    if cluster.container == "pyxis":
        # What the image sets would win.
        names = ",".join(["PYTHONPATH", *sorted(cluster.variables)])
        own = [f"--container-image={image}", f"--container-mounts={','.join(mounts)}"]
        own += [f"--container-env={names}", *cluster.container_options]
    if cluster.container == "apptainer":
        binds = [f"--bind={mount}" for mount in mounts]
        gpus = ["--nv"] if layout.device == "cuda" else []
        task = ["apptainer", "exec", *gpus, *binds, *cluster.container_options, image, *task]
    return ["srun", "--unbuffered", *step_options(config, layout), *own, *options, *task]


def requeue_line(config: RunConfig, run_dir: Path, driver: str) -> str:
    """The shell line after the step: the job goes on, or it says why not, and has the exit code."""
    command = [*module_command(python_of_script(config), "jobs.requeue"), str(run_dir)]
    return f"{shlex.join(command)} $? {shlex.quote(driver)}"
