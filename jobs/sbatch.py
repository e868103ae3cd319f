"""The text of a run's job: its sbatch options, its srun step and its batch script.

All functions are pure, but for reading a site's own template, and tested as text;
tools/submit/slurm_submit.py hands the text to SLURM.
"""

import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jobs import snapshot
from jobs.checkout import ROOT, module_command
from jobs.run_files import SUBMITIT_FOLDER
from nanoslime.config.cluster import ClusterConfig
from nanoslime.config.run import RunConfig
from nanoslime.layout import Layout
from nanoslime.types import RunError

OUTLIVES_STEP = "trap : TERM"
"""The shell line before a run's step: SIGTERM ends the step of a job whose time is up, and not the
script, which then says whether the job goes on.
"""
_UNPREPARED = "'the directory of this run is not there: make it by jobs/submit_grpo.py --prepare'"
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


def setup_lines(config: RunConfig, code: Path = ROOT) -> list[str]:
    """Shell lines before the step: modules, site setup, the job's environment, and in PYTHONPATH
    the code first and the working directory last.
    """
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
    path = f'{shlex.quote(str(code))}"${{PYTHONPATH:+:$PYTHONPATH}}:$PWD"'
    lines.append(f"export PYTHONPATH={path}")
    if cluster.container == "apptainer":
        # What the image sets would win.
        lines.append('export APPTAINERENV_PYTHONPATH="$PYTHONPATH"')
    return lines


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


def batch_script(
    options: Mapping[str, str | bool], config: RunConfig, *lines: str, code: Path = ROOT
) -> str:
    """A batch script that sets up the job and goes on with `lines`; values are quoted.

    Raises RunError for a value that would break out of its line, and for a template of the site's
    that has not a place for each part.
    """
    directives = []
    for option, value in options.items():
        if "\n" in str(value):
            raise RunError(f"sbatch --{option}={value!r} has a line break, which no job may have")
        if value is True or value == "":
            directives.append(f"#SBATCH --{option}")
        else:
            directives.append(f"#SBATCH --{option}={shlex.quote(str(value))}")
    parts = {"@directives@": directives, "@setup@": setup_lines(config, code), "@step@": lines}
    script: list[str] = []
    for line in _template(config.cluster.script_template, parts):
        script += parts.get(line.strip(), [line])
    return "\n".join(script) + "\n"


def _template(file: str, places: Iterable[str]) -> list[str]:
    """The lines of a site's own template, or of ours where `file` is empty, with each of `places`
    once among them.
    """
    if not file:
        return ["#!/bin/bash", "@directives@", "", "@setup@", "@step@"]
    lines = Path(file).expanduser().read_text().splitlines()
    counted = Counter(line.strip() for line in lines)
    for place in places:
        if counted[place] != 1:
            raise RunError(
                f"cluster.script_template={file!r} has {counted[place]} lines {place}; it needs "
                f"{', '.join(places)} once each, on a line of its own"
            )
    return lines


def sbatch_text(
    config: RunConfig,
    layout: Layout,
    run_dir: Path,
    driver: str = "",
    *,
    code: Path = ROOT,
    submitit: bool = False,
) -> str:
    """The batch script of a run's job; any path is quoted.

    code: what its processes run. submitit: its tasks are those that submitit has pickled.
    """
    options = sbatch_options(config, layout)
    # sbatch takes % for a pattern in this path.
    options["output"] = str(run_dir).replace("%", "%%") + "/slurm-%j.out"
    lines = [
        "",
        f"test -d {shlex.quote(str(code))} || {{ echo {_UNPREPARED} >&2; exit 1; }}",
        OUTLIVES_STEP,
    ]
    if submitit:
        lines.append("export SUBMITIT_EXECUTOR=slurm")
        folder = str(run_dir / SUBMITIT_FOLDER)
        task = [*module_command(python_of(config), "submitit.core._submit"), folder]
    else:
        task = agent_command(config, run_dir, driver)
    lines.append(shlex.join(step_command(config, layout, run_dir, task)))
    lines.append(requeue_line(config, run_dir, driver))
    return batch_script(options, config, *lines, code=code)


def by_submitit(config: RunConfig) -> bool:
    """Whether submitit submits: it knows no chains, and has no place in a site's own template."""
    cluster = config.cluster
    is_plain = cluster.goes_on_by == "requeue" and not cluster.script_template
    return cluster.submit == "submitit" and is_plain


def script_to_submit(config: RunConfig, layout: Layout, run_dir: Path) -> str:
    """The script that a submission of the run would hand to SLURM, byte for byte."""
    code = snapshot.next_place(run_dir)
    return sbatch_text(config, layout, run_dir, code=code, submitit=by_submitit(config))


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
