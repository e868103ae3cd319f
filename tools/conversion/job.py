"""Submits a checkpoint conversion to SLURM, a job of one node, or runs it without SLURM.

    python3 jobs/submit_convert.py hf-to-megatron HF_DIR OUT [options of tools/hf_to_megatron.py]

    the tool's own --dry-run, on this machine -> batch script -> sbatch

A job that SLURM requeues goes on where it was: it runs the same command, and the tool
continues. Its code is a copy of this checkout's beside its log, which it removes when it has
succeeded. Deliberately not here: whatever a checkpoint is. The tools are run as commands.
"""

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from jobs import submission
from jobs.checkout import ROOT, environment
from jobs.sbatch import common_options, python_of_script
from nanoslime.config import RunConfig
from nanoslime.config.load import load
from nanoslime.processes.command import ask
from nanoslime.types import RunError
from tools.submit import sites, snapshot, where
from tools.submit.batch_script import batch_script, submitted
from tools.submit.grpo import add_target

# The tools and the directories that they take.
CONVERSIONS = {"hf-to-megatron": "HF_DIR OUT", "megatron-to-hf": "MEGATRON_DIR OUT"}
TOOLS = {**CONVERSIONS, "verify-checkpoint": "A B", "inspect-checkpoint": "DIR"}
# A plan reads the headers of all files.
_DEADLINE_S = 120.0
_MAX_CPUS = 8


def main(argv: list[str], environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> int:
    """The exit code: 0 submitted, 2 refused.

    A tool that runs here takes the place of this process.
    """
    try:
        command = parse(argv)
        if not (command.cluster or command.local):
            command.cluster = sites.of_this_machine(environ)
        config = load(None, command.cluster, command.flags)
        slurm = where.detect(environ.get("PATH", ""), environ, root, command.cluster)
        return run(command, config, slurm)
    except RunError as error:
        print(f"submit_convert: {error}", file=sys.stderr)
        return 2


def parse(argv: list[str]) -> argparse.Namespace:
    """What is to run, and how it is submitted.

    `options` are those that this command does not know: the tool's, as typed. `flags` set fields of
    the configuration over the cluster file.
    """
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser("submit_convert.py", description=summary, allow_abbrev=False)
    tools = ", ".join(f"{tool} {directories}" for tool, directories in TOOLS.items())
    parser.add_argument("tool", choices=TOOLS, metavar="TOOL", help=tools)
    paths = "what the tool takes; then its own options"
    parser.add_argument("paths", nargs="+", type=Path, metavar="DIR", help=paths)
    add_target(parser)
    parser.add_argument(
        "--partition", help="in place of the cluster file's; a conversion needs no GPU"
    )
    parser.add_argument("--time-limit-min", help="in place of the cluster file's")
    cores = f"cores, and threads of a conversion (as the node has, up to {_MAX_CPUS})"
    parser.add_argument("--cpus", type=int, help=cores)
    command, options = parser.parse_known_args(argv)
    command.options = options
    directories = TOOLS[command.tool]
    if len(command.paths) != len(directories.split()):
        raise RunError(f"{command.tool} takes {directories}, and then its own options")
    command.paths = [path.absolute() for path in command.paths]
    command.flags = []
    if command.partition is not None:
        command.flags.append(f"--partition={command.partition}")
    if command.time_limit_min is not None:
        command.flags.append(f"--time-limit-min={command.time_limit_min}")
    command.is_conversion = command.tool in CONVERSIONS
    return command


def run(command: argparse.Namespace, config: RunConfig, slurm: where.Where) -> int:
    """From the command to a job id, a printed plan, or the tool in our place."""
    local_line = f"LOCAL, nothing is submitted: {command.tool} runs on this machine"
    if not command.dry_run and not slurm.has_slurm(local=command.local):
        print(local_line, flush=True)
        words = tool_words(command, sys.executable, command.cpus)
        os.execve(sys.executable, words, environment())
    tool_plan = check(command)
    log = _log_prefix(command)
    code = _place_of_code(log)
    script = sbatch_text(command, config, log, Path.cwd(), code)
    if command.dry_run:
        print(f"--- plan\n{tool_plan}--- batch script\n{script}--- checks")
    else:
        print(tool_plan, end="")
    if not slurm.has_slurm(local=command.local) or slurm.sbatch is None:
        print(f"without --dry-run: {local_line}")
        return 0
    python = python_of_script(config)
    if not (config.cluster.conda or os.access(python, os.X_OK)):
        raise RunError(f"cluster.venv: there is no {python}; make it, or leave cluster.venv out")
    if command.dry_run:
        print(where.test_only(slurm.sbatch, script))
        return 0
    make_folder(log)
    with _snapshot(code):
        job = submission.submit(slurm.sbatch, script)
    resume = ""
    if command.is_conversion:
        resume = "the same command; what is written already is kept"
    print(submitted(job, shlex.quote(f"{log}{job}.out"), resume))
    return 0


def check(command: argparse.Namespace) -> str:
    """The conversion's own plan.

    Raises RunError with the reason why the tool refuses, or for a missing directory.
    """
    if command.is_conversion:
        words = [*tool_words(command, sys.executable, None), "--dry-run"]
        done = ask(words, _DEADLINE_S, env=environment())
        if done.returncode:
            raise RunError(done.stderr.strip())
        return done.stdout
    missing = [str(path) for path in command.paths if not path.is_dir()]
    if missing:
        raise RunError(f"no directory: {', '.join(missing)}")
    return ""


def make_folder(log: str) -> None:
    """Make the directory of the job's log, without which SLURM would drop the job's output.

    Raises RunError where it cannot be written.
    """
    folder = Path(log).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written, and the job's log goes there: {error.strerror}"
        ) from error


def tool_words(
    command: argparse.Namespace, python: str, threads: int | None, code: Path = ROOT
) -> list[str]:
    """The tool as a command; of two --threads it takes the last, a user's own."""
    script = code / "tools" / f"{command.tool.replace('-', '_')}.py"
    words = [python, str(script), *map(str, command.paths)]
    if threads and command.is_conversion:
        words += ["--threads", str(threads)]
    return [*words, *command.options]


def sbatch_text(
    command: argparse.Namespace, config: RunConfig, log: str, folder: Path, code: Path
) -> str:
    """The batch script. Pure; paths are quoted.

    Its job runs the snapshot `code` in `folder` and writes its output to `log`<job id>.out.
    """
    if "\n" in log or "\\" in log:
        raise RunError(f"{log!r}: SLURM writes no log to a path with a line break or a backslash")
    cluster = config.cluster
    cpus = command.cpus or min(_MAX_CPUS, cluster.cpus_per_node or _MAX_CPUS)
    options = common_options(cluster, command.tool, cpus)
    options["nodes"] = "1"
    options["ntasks"] = "1"
    options.update(cluster.extra_sbatch)
    # sbatch takes % for a pattern in this path.
    options["output"] = f"{log.replace('%', '%%')}%j.out"
    python = python_of_script(config)
    if not config.cluster.conda:
        python = os.path.abspath(python)
    task = shlex.join(tool_words(command, python, cpus, code))
    clean = f"rm -rf -- {shlex.quote(str(code))}"
    enter = f"cd {shlex.quote(str(folder))}"
    return batch_script(options, config, enter, f"{task} && {clean}", code=code)


def _log_prefix(command: argparse.Namespace) -> str:
    """The job's log up to the job's id: beside the output, or in this directory."""
    if command.is_conversion:
        return f"{command.paths[-1]}.slurm-"
    return f"{Path.cwd() / command.tool}.slurm-"


@contextmanager
def _snapshot(place: Path) -> Iterator[None]:
    """This checkout's code is at `place`, unless the block raises. RunError where it cannot be
    written there, of which nothing is left.
    """
    try:
        snapshot.take(place)
    except OSError as error:
        raise RunError(f"the job's code is not copied to {place}: {error}") from error
    try:
        yield
    except BaseException:
        shutil.rmtree(place)
        raise


def _place_of_code(log: str) -> Path:
    """Where the job's snapshot goes: no other job's that waits, runs, or has failed."""
    number = 1
    while Path(f"{log}code-{number}").exists():
        number += 1
    return Path(f"{log}code-{number}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
