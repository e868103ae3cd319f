"""The text of a job's batch script.

All functions are pure, but for reading a site's own template, and tested as text; slurm_submit.py
hands the text to SLURM. The options and the step in it are those of jobs/sbatch.py.
"""

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from jobs.checkout import ROOT, module_command
from jobs.sbatch import (
    OUTLIVES_STEP,
    agent_command,
    python_of,
    requeue_line,
    sbatch_options,
    step_command,
)
from nanoslime.config.run import RunConfig
from nanoslime.layout import Layout
from nanoslime.types import RunError
from tools.submit import snapshot
from tools.submit.run_files import SUBMITIT_FOLDER

_UNPREPARED = "'the directory of this run is not there: make it by jobs/submit_grpo.py --prepare'"


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
