"""Submits a sweep as one SLURM job array, or rehearses it without SLURM, one run after the other.

    python3 jobs/submit_grpo.py --sweep sweep.yaml [--max-running K] [flags of jobs/submit_grpo.py]
    python3 jobs/submit_grpo.py --sweep sweep.yaml --only INDEX      one element again, alone

Each element is planned and checked before anything is made; one that is refused refuses the sweep.
An element's own job.sbatch is what its task of the array runs, so that it can also go on alone.
"""

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jobs import submission
from jobs.checkout import typed
from nanoslime.config import RunConfig
from nanoslime.config.flags import parse as parse_flags
from nanoslime.layout import Layout
from nanoslime.run_dir import DONE, STOPPED, RunDir
from nanoslime.storage.shared_files import publish
from nanoslime.types import RunError
from tools.provenance import write_provenance
from tools.staging import environment as staged_environment
from tools.submit import batch_script, inputs, limits, local, snapshot, where
from tools.submit import grpo as submit_grpo
from tools.sweep import compare, spec, table

# The options of a job that belong to its run, and not to the array.
_OF_THE_RUN = ("#SBATCH --job-name=", "#SBATCH --output=")
ARRAY_SCRIPT = "array.sbatch"


@dataclass(frozen=True, slots=True)
class Planned:
    """An element that may be submitted."""

    element: spec.Element
    config: RunConfig
    layout: Layout
    description: str


def main(argv: list[str], environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> int:
    """The exit code: 0 submitted or all ended well, 2 refused, else that of a run that did not."""
    try:
        asked, rest = _parse(argv)
        if asked.only is not None:
            return _again(asked, rest, environ, root)
        command, flags = submit_grpo.parse(rest)
        _refuse_single(command)
        submit_grpo.find_cluster(command, environ)
        sweep = spec.read(asked.sweep)
        slurm = where.detect(environ.get("PATH", ""), environ, root, command.cluster)
        submits = slurm.has_slurm(local=command.local)
        planned = plan(sweep, command, flags, submits=submits)
        if command.dry_run:
            return _dry_run(sweep, planned, asked.max_running, slurm if submits else None)
        if submits:
            return submit(asked.sweep, sweep, planned, asked.max_running)
        return rehearse(asked.sweep, sweep, planned)
    except (RunError, OSError) as error:
        print(f"submit_grpo: {error}", file=sys.stderr)
        return 2


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser("submit_grpo.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--sweep", type=Path, required=True)
    parser.add_argument("--max-running", type=_positive)
    parser.add_argument("--only", type=int, metavar="INDEX")
    return parser.parse_known_args(argv)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} runs at a time is none; give 1 or more")
    return number


def _refuse_single(command: argparse.Namespace) -> None:
    for option in ("resume", "prepare", "print_sbatch"):
        if getattr(command, option):
            raise RunError(
                f"--{option.replace('_', '-')} is for one run; with --sweep leave it out"
            )


def plan(
    sweep: spec.Sweep, command: argparse.Namespace, flags: list[str], *, submits: bool
) -> list[Planned]:
    """Plans and checks all elements. RunError names those that are refused, with the reason."""
    refused: dict[str, list[str]] = {}
    planned: list[Planned] = []
    _refuse_seed_flag(sweep, flags)
    for element in sweep.elements:
        try:
            words = [*flags, *element.flags]
            config = submit_grpo.configure(command, words)
            name = _name(sweep, element)
            config = replace(config, name=name)
            submit_grpo.check_target(config, submits)
            sources = submit_grpo.sources_of(command, words)
            config, layout, description = submit_grpo.plan(
                config, sources, command.cluster, download=not command.dry_run
            )
            if submits:
                inputs.check_environment(config)
            planned.append(Planned(element, config, layout, description))
        except (RunError, ValueError) as error:
            refused.setdefault(str(error), []).append(element.title)
    if submits and planned and not refused:
        # All of them ask SLURM for the same.
        limits.check_limits(planned[0].config, planned[0].layout)
    if refused:
        lines = [f"{_several(titles)}: {reason}" for reason, titles in refused.items()]
        raise RunError("the sweep is refused, nothing was submitted\n" + "\n".join(lines))
    return planned


def _refuse_seed_flag(sweep: spec.Sweep, flags: list[str]) -> None:
    has_seeds = any(element.seed is not None for element in sweep.elements)
    if has_seeds and any(flag.field == "seed" for flag in parse_flags(flags)):
        raise RunError("--seed and the sweep's seeds both set the seed; give one of them")


def _name(sweep: spec.Sweep, element: spec.Element) -> str:
    """The name of an element's run; names sort as their elements do."""
    width = len(str(len(sweep.elements) - 1))
    return f"{sweep.name}-{element.index:0{width}d}"


def _several(titles: Sequence[str]) -> str:
    return titles[0] if len(titles) == 1 else f"{titles[0]} and {len(titles) - 1} more"


def array_script(planned: Sequence[Planned], runs: Sequence[Path], max_running: int | None) -> str:
    """The batch script of the array. Pure; any path is quoted.

    Each task runs the script of its element's run. All tasks of an array ask SLURM for the same:
    RunError where elements need different things.
    """
    scripts = [
        batch_script.sbatch_text(one.config, one.layout, run)
        for one, run in zip(planned, runs, strict=True)
    ]
    wanted = _directives(scripts[0])
    for one, script in zip(planned, scripts, strict=True):
        own = _directives(script)
        if own != wanted:
            raise RunError(
                f"{one.element.title} asks SLURM for {_without(own, wanted)}, and "
                f"{planned[0].element.title} for {_without(wanted, own)}; a job array asks for the "
                "same in all its tasks, so make a sweep of each"
            )
    folder = runs[0].parent
    at_once = f"%{max_running}" if max_running else ""
    # sbatch takes % for a pattern in this path.
    directory = str(folder).replace("%", "%%")
    of_array = {
        "job-name": folder.name,
        "array": f"0-{len(runs) - 1}{at_once}",
        "output": f"{directory}/slurm-%A_%a.out",
    }
    lines = [scripts[0].splitlines()[0], *wanted]
    lines += [f"#SBATCH --{option}={shlex.quote(value)}" for option, value in of_array.items()]
    lines += ["", 'case "$SLURM_ARRAY_TASK_ID" in']
    lines += [f"{index}) run={shlex.quote(str(run))} ;;" for index, run in enumerate(runs)]
    lines += ["esac", 'exec bash "$run/job.sbatch" >> "$run/slurm-$SLURM_JOB_ID.out" 2>&1']
    return "\n".join(lines) + "\n"


def _directives(script: str) -> list[str]:
    """What a batch script asks SLURM for, its name and output aside."""
    found = [line for line in script.splitlines() if line.startswith("#SBATCH ")]
    return [line for line in found if not line.startswith(_OF_THE_RUN)]


def _without(lines: Sequence[str], others: Sequence[str]) -> str:
    left = [line.removeprefix("#SBATCH ") for line in lines if line not in others]
    return " ".join(left) or "less"


def submit(
    source: Path,
    sweep: spec.Sweep,
    planned: Sequence[Planned],
    max_running: int | None,
    driver: str = "",
) -> int:
    """Submits the array; one that SLURM refuses leaves nothing."""

    def send(directory: table.Table) -> str:
        runs = [directory.run(row) for row in directory.rows]
        script = array_script(planned, runs, max_running)
        for one, run in zip(planned, runs, strict=True):
            code = snapshot.take(snapshot.next_place(run))
            own = batch_script.sbatch_text(one.config, one.layout, run, driver, code=code)
            publish(RunDir(run).batch_script, own.encode())
        publish(directory.directory / ARRAY_SCRIPT, script.encode())
        job = submission.submit("sbatch", script)
        for row in directory.rows:
            submission.record_job(RunDir(directory.run(row)), f"{job}_{row.index}")
        return job

    made, job = make(source, sweep, planned, send)
    print(_summary(made, planned))
    print(batch_script.submitted(job, f"{made.directory}/*/attempts/latest/logs/driver-0.log", ""))
    again = typed("jobs/submit_grpo.py", "--sweep", made.directory)
    print(f"  watch   {typed('jobs/runs.py', 'ps', made.directory)}")
    print(f"  compare {typed('jobs/runs.py', 'compare', made.directory)}")
    print(f"  resume  {again} --only INDEX")
    return 0


def rehearse(source: Path, sweep: spec.Sweep, planned: Sequence[Planned]) -> int:
    """Runs one element after the other on this machine. One that fails does not keep the others
    from running; one that was stopped does.
    """
    made, _ = make(source, sweep, planned, lambda _: "")
    print(_summary(made, planned), flush=True)
    worst = DONE
    for one, row in zip(planned, made.rows, strict=True):
        print(f"\n{one.element.title}: {submit_grpo.rehearsal_line(one.config)}", flush=True)
        code = local.run_local(one.config, one.layout, RunDir.open(made.run(row)))
        worst = code or worst
        if code == STOPPED:
            break
    print("\n".join(compare.lines([made.directory])))
    return worst


def make(
    source: Path,
    sweep: spec.Sweep,
    planned: Sequence[Planned],
    send: Callable[[table.Table], str],
) -> tuple[table.Table, str]:
    """The directory of a sweep with a prepared run for each element, and the answer of `send`.

    Where anything fails, also `send`, all files are as before.
    """
    cluster = planned[0].config.cluster
    root = Path(cluster.run_root)
    missing = [folder for folder in (root, *root.parents) if not folder.exists()]
    directory = _new_directory(root, sweep.name, cluster.share)
    try:
        rows = []
        for one in planned:
            run = RunDir.create(directory, one.config.name, cluster.share)
            run.write_config(one.config, one.layout)
            write_provenance(run, sys.argv)
            staged_environment.record(one.config, run)
            element = one.element
            rows.append(table.Row(element.index, element.setting, one.config.seed, run.name))
        made = table.Table(directory, str(source.absolute()), tuple(rows))
        made.write()
        publish(directory / "sweep.yaml", source.read_bytes())
        return made, send(made)
    except BaseException:
        shutil.rmtree(directory)
        for folder in missing:
            if folder.is_dir() and not os.listdir(folder):
                folder.rmdir()
        raise


def _new_directory(root: Path, name: str, share: str) -> Path:
    """A directory of this name, or of one with the time behind it, that only the user may read,
    or a group, too.
    """
    made = RunDir.create(root, name, share).path
    # It is made like a run's, and holds runs instead.
    for folder in made.iterdir():
        folder.rmdir()
    return made


def _dry_run(
    sweep: spec.Sweep,
    planned: Sequence[Planned],
    max_running: int | None,
    slurm: where.Where | None,
) -> int:
    directory = Path(planned[0].config.cluster.run_root) / sweep.name
    runs = [directory / one.config.name for one in planned]
    print(f"--- {len(planned)} elements")
    print("\n".join(one.element.title for one in planned))
    print(f"\n--- plan of {planned[0].element.title}\n{planned[0].description}\n")
    if slurm is None:
        print("--- checks\nwithout --dry-run: a LOCAL REHEARSAL, one element after the other")
        return 0
    script = array_script(planned, runs, max_running)
    print(f"--- batch script of the array\n{script}\n--- checks")
    if slurm.sbatch:
        print(where.test_only(slurm.sbatch, script))
    return 0


def _again(
    asked: argparse.Namespace, rest: list[str], environ: Mapping[str, str], root: Path
) -> int:
    """Goes on with one element of a sweep that was submitted before."""
    directory = asked.sweep
    if not table.is_sweep(directory):
        directory = _latest(asked.sweep, rest, environ)
    known = table.read(directory)
    by_index = {row.index: row for row in known.rows}
    if asked.only not in by_index:
        raise RunError(f"{directory} has no element {asked.only}; it has 0 to {len(by_index) - 1}")
    run = known.run(by_index[asked.only])
    return submit_grpo.main(["--resume", str(run), *rest], environ, root)


def _latest(source: Path, rest: list[str], environ: Mapping[str, str]) -> Path:
    """The newest sweep that this file asked for."""
    command, flags = submit_grpo.parse(rest)
    submit_grpo.find_cluster(command, environ)
    root = Path(submit_grpo.configure(command, flags).cluster.run_root or "runs").expanduser()
    found = []
    damaged = []
    for path in root.glob(f"*/{table.TABLE}"):
        try:
            asked_for_by = table.read(path.parent).source
        except RunError as error:
            damaged.append(f"; {error}")
            continue
        if asked_for_by == str(source.absolute()):
            found.append((path.stat().st_mtime, path.parent))
    if not found:
        raise RunError(
            f"{source} has no sweep in {root.absolute()} yet; submit it without --only, or name "
            f"the directory of the sweep in its place{''.join(damaged)}"
        )
    return max(found)[1]


def _summary(made: table.Table, planned: Sequence[Planned]) -> str:
    lines = [planned[0].description, "", f"sweep directory: {made.directory}"]
    lines += [f"  {made.rows[i].run}  {one.element.title}" for i, one in enumerate(planned)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
