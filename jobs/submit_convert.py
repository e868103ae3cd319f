"""Submits a checkpoint conversion to SLURM, a job of one node; where nothing of SLURM exists, it runs here.

    python jobs/submit_convert.py hf-to-megatron HF_DIR OUT [options of tools/hf_to_megatron.py]

    the tool's own --dry-run, on this machine -> batch script -> sbatch

A job that SLURM requeues goes on where it was: it runs the same command, and the tool continues.
Deliberately not here: whatever a checkpoint is. The tools are run as commands.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile

from jobs import where
from jobs.executor import batch_script, common_options, python_of, submitted
from jobs.node import ROOT, environment
from jobs.submit_grpo import CLUSTERS, yaml_file
from nanoslime.config import RunConfig
from nanoslime.config.load import load
from nanoslime.processes.command import ask
from nanoslime.types import RunError

CONVERSIONS = {
    "hf-to-megatron": "HF_DIR OUT",
    "megatron-to-hf": "MEGATRON_DIR OUT",
}  # and what they take
TOOLS = CONVERSIONS | {"verify-checkpoint": "A B", "inspect-checkpoint": "DIR"}
_DEADLINE_S = 120.0  # of a plan, which reads the headers of all files, and of sbatch
_MAX_CPUS = 8


def main(argv: list[str], environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> int:
    """The exit code: 0 submitted, 2 refused. A tool that runs here takes the place of this process."""
    try:
        command = parse(argv)
        config = load(None, command.cluster, command.flags)
        return run(
            command, config, where.detect(environ.get("PATH", ""), environ, root, command.cluster)
        )
    except RunError as e:
        print(f"submit_convert: {e}", file=sys.stderr)
        return 2


def parse(argv: list[str]) -> argparse.Namespace:
    """What is to run and how it is submitted; what this command does not know is the tool's (`options`)."""
    what = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser("submit_convert.py", description=what, allow_abbrev=False)
    add = parser.add_argument
    add(
        "tool",
        choices=TOOLS,
        metavar="TOOL",
        help=", ".join(f"{t} {dirs}" for t, dirs in TOOLS.items()),
    )
    add(
        "paths",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="what the tool takes; then its own options",
    )
    add("--cluster", metavar="FILE|NAME", help="a cluster: a YAML file, or one of env/clusters")
    add("--partition", help="in place of the cluster file's; a conversion needs no GPU")
    add("--time-limit-min", help="in place of the cluster file's")
    add(
        "--cpus",
        type=int,
        help=f"cores, and threads of a conversion (as the node has, up to {_MAX_CPUS})",
    )
    add("--local", action="store_true", help="run on this machine, whatever SLURM there is")
    add(
        "--dry-run",
        action="store_true",
        help="print the tool's plan and the batch script; submit nothing",
    )
    command, options = parser.parse_known_args(argv)
    command.options = options
    if len(command.paths) != len(TOOLS[command.tool].split()):
        raise RunError(f"{command.tool} takes {TOOLS[command.tool]}, and then its own options")
    command.paths = [path.absolute() for path in command.paths]
    command.cluster = yaml_file(command.cluster, CLUSTERS)
    given = {"--partition": command.partition, "--time-limit-min": command.time_limit_min}
    command.flags = [f"{flag}={value}" for flag, value in given.items() if value is not None]
    return command


def run(command: argparse.Namespace, config: RunConfig, slurm: where.Where) -> int:
    """From the command to a job id, a printed plan, or the tool itself in place of this process."""
    here = f"LOCAL, nothing is submitted: {command.tool} runs on this machine"
    if not command.dry_run and not slurm.has_slurm(local=command.local):
        print(here, flush=True)
        os.execve(sys.executable, tool_words(command, sys.executable, command.cpus), environment())
    plan = check(command)
    log = (
        f"{command.paths[-1] if command.tool in CONVERSIONS else Path.cwd() / command.tool}.slurm-"
    )
    script = sbatch_text(command, config, log, Path.cwd())
    print(
        f"--- plan\n{plan}--- batch script\n{script}--- checks\n" if command.dry_run else plan,
        end="",
    )
    if not slurm.has_slurm(local=command.local) or slurm.sbatch is None:
        print(f"without --dry-run: {here}")
        return 0
    if not os.access(python := python_of(config), os.X_OK):
        raise RunError(f"cluster.venv: there is no {python}; make it, or leave cluster.venv out")
    if command.dry_run:
        print(where.test_only(slurm.sbatch, script))
        return 0
    job = submit(slurm.sbatch, script, Path(log).parent)
    resume = (
        "the same command; what is written already is kept" if command.tool in CONVERSIONS else ""
    )
    print(submitted(job, shlex.quote(f"{log}{job}.out"), resume))
    return 0


def check(command: argparse.Namespace) -> str:
    """The conversion's own plan. Raises RunError with what the tool refuses, or for a missing directory."""
    if command.tool in CONVERSIONS:
        words = [*tool_words(command, sys.executable, None), "--dry-run"]
        done = ask(words, _DEADLINE_S, env=environment())
        if done.returncode:
            raise RunError(done.stderr.strip())
        return done.stdout
    if missing := [str(path) for path in command.paths if not path.is_dir()]:
        raise RunError(f"no directory: {', '.join(missing)}")
    return ""


def submit(sbatch: Path, script: str, log_folder: Path) -> str:
    """The job's id. Without its log's directory, SLURM would drop what the job says."""
    try:
        log_folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=log_folder).close()
    except OSError as e:
        raise RunError(
            f"{log_folder} cannot be written, and the job's log goes there: {e.strerror}"
        ) from e
    done = ask([str(sbatch), "--parsable"], _DEADLINE_S, stdin=script)
    if done.returncode:
        raise RunError(f"sbatch refused the job: {' '.join(done.stderr.split())}")
    return done.stdout.strip().split(";")[0]


def tool_words(command: argparse.Namespace, python: str, threads: int | None) -> list[str]:
    """The tool as a command; of two --threads it takes the last, a user's own."""
    more = ["--threads", str(threads)] if threads and command.tool in CONVERSIONS else []
    script = ROOT / "tools" / f"{command.tool.replace('-', '_')}.py"
    return [python, str(script), *map(str, command.paths), *more, *command.options]


def sbatch_text(command: argparse.Namespace, config: RunConfig, log: str, folder: Path) -> str:
    """The batch script; its job runs in `folder`, its output is `log`<job id>.out. Pure; paths are quoted."""
    if {"\n", "\\"} & set(log):
        raise RunError(f"{log!r}: SLURM writes no log to a path with a line break or a backslash")
    cluster = config.cluster
    cpus = command.cpus or min(_MAX_CPUS, cluster.cpus_per_node or _MAX_CPUS)
    options = common_options(cluster, command.tool, cpus) | {"nodes": "1", "ntasks": "1"}
    options |= cluster.extra_sbatch | {"output": f"{log.replace('%', '%%')}%j.out"}
    task = shlex.join(tool_words(command, os.path.abspath(python_of(config)), cpus))
    return batch_script(options, config, f"cd {shlex.quote(str(folder))}", f"exec {task}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
