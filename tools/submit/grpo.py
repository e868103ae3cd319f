"""Plans a GRPO run, checks it and submits it to SLURM, or rehearses it without SLURM.

    recipe + cluster file + flags -> configuration -> plan -> checks -> run directory
    -> job or rehearsal

Deliberately not here: what runs inside the job (jobs/node.py), and torch. A plan takes less
than a second.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from jobs.checkout import ROOT, environment, typed
from nanoslime.config import RunConfig
from nanoslime.config.flags import HELP, refuse_repeated
from nanoslime.config.flags import parse as parse_flags
from nanoslime.config.load import dump, load, set_by
from nanoslime.layout import Layout
from nanoslime.plugins import resolve
from nanoslime.run_dir import RunDir, candidate_names
from nanoslime.storage.shared_files import publish, read_json
from nanoslime.types import RunError
from tools.memory import plan as memory_plan
from tools.provenance import write_provenance
from tools.staging import environment as staged_environment
from tools.submit import batch_script, inputs, limits, local, sites, snapshot, where
from tools.submit.choose import choose, ways_out, with_sizes
from tools.submit.lead import with_measured_lead
from tools.submit.plan_text import CHOSEN, describe
from tools.submit.run_files import alone, kept_if_accepted

RECIPES = ROOT / "jobs" / "recipes"
SUBMITTERS = {
    "submitit": "tools.submit.slurm_submit:submit_submitit",
    "sbatch": "tools.submit.slurm_submit:submit_sbatch",
}


def main(argv: list[str], environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> int:
    """The exit code: 0 submitted or ended well, 2 refused, else that of the rehearsal."""
    if any(word.partition("=")[0] in HELP for word in argv):
        help_command = [sys.executable, "-m", "tools.field_help", *argv]
        return subprocess.run(help_command, env=environment(), check=False).returncode
    if "--tune" in argv:
        tune_command = [sys.executable, "-m", "tools.tune.command", *argv]
        return subprocess.run(tune_command, env=environment(), check=False).returncode
    try:
        command, flags = parse(argv)
        if command.sweep:
            start_sweep(argv)
        find_cluster(command, environ)
        config = configure(command, flags)
        sources = sources_of(command, flags)
        slurm = where.detect(environ.get("PATH", ""), environ, root, command.cluster)
        if command.dry_run:
            return dry_run(command, config, slurm, sources)
        if command.print_sbatch and not command.prepare:
            return print_sbatch(command, config, sources)
        return run(command, config, slurm, sources)
    except BrokenPipeError:
        # The reader of a plan or of the help, `| head`, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (RunError, OSError) as error:
        print(f"submit_grpo: {error}", file=sys.stderr)
        return 2


def find_cluster(command: argparse.Namespace, environ: Mapping[str, str]) -> None:
    """Where no cluster file is given, takes the stored one of the cluster of this machine."""
    if not (command.cluster or command.resume or command.local):
        command.cluster = sites.of_this_machine(environ)


def start_sweep(argv: list[str]) -> NoReturn:
    """The command of tools/sweep takes this one's place."""
    sys.stdout.flush()
    command = [sys.executable, "-m", "tools.sweep.command", *argv]
    os.execve(sys.executable, command, environment())


def run(
    command: argparse.Namespace, config: RunConfig, slurm: where.Where, sources: dict[str, str]
) -> int:
    """From the configuration to a job id, a rehearsal's end, or a prepared directory."""
    submits = command.prepare or slurm.has_slurm(local=command.local)
    check_target(config, submits)
    config, layout, description = plan(config, sources, command.cluster, download=True)
    if submits:
        limits.check_limits(config, layout)
        inputs.check_environment(config)
    resumed = RunDir.open(command.resume) if command.resume else None
    if resumed is not None:
        inputs.check_resume(resumed, config)
    else:
        inputs.check_run_root(config)
    if command.prepare:
        return prepare(command, config, layout, resumed)
    if submits:
        return submit(config, layout, resumed, description)
    print(rehearsal_line(config), flush=True)
    run = resumed or RunDir.create(Path(config.cluster.run_root), config.name, config.cluster.share)
    run.write_config(config, layout)
    write_provenance(run, ["jobs/submit_grpo.py", *sys.argv[1:]])
    staged_environment.record(config, run)
    print(f"{description}\n\nrun directory: {run.path}", flush=True)
    code = local.run_local(config, layout, run)
    print(summary_table(run))
    return code


def plan(
    config: RunConfig, sources: dict[str, str], cluster: Path | None, *, download: bool
) -> tuple[RunConfig, Layout, str]:
    """The configuration with all inputs found, where everything goes, and what a person is told."""
    config, shape, prompts = inputs.resolve(config, download=download)
    chosen = choose(config, shape, sources)
    config = with_sizes(config, chosen)
    try:
        layout = memory_plan.plan(config, shape)
    except RunError as error:
        raise RunError(f"{error}{ways_out(config, shape)}") from error
    sources = sources | dict.fromkeys(chosen, CHOSEN)
    description = describe(config, shape, layout, prompts, sources)
    if cluster is not None:
        description += f"\ncluster   {config.cluster.name}, as {cluster} says"
    return config, layout, description


def dry_run(
    command: argparse.Namespace, config: RunConfig, slurm: where.Where, sources: dict[str, str]
) -> int:
    """Print verdict, plan and batch script; code 2 for a run to be refused."""
    config, layout, description = plan(config, sources, command.cluster, download=False)
    script = batch_script.script_to_submit(config, layout, run_dir_of(command, config))
    fits, _, rest = description.partition("\n")
    try:
        verdict = f"{fits}; {accepted(command, config, layout, slurm, script)}"
        code = 0
    except RunError as error:
        verdict = f"would be refused: {error}"
        code = 2
    print(f"{verdict}\n{rest}\n")
    if command.verbose:
        print(f"--- configuration\n{dump(config)}")
    print(f"--- batch script\n{script}", end="")
    return code


def accepted(
    command: argparse.Namespace,
    config: RunConfig,
    layout: Layout,
    slurm: where.Where,
    script: str,
) -> str:
    """What a submission would do. Raises RunError where it would be refused."""
    submits = slurm.has_slurm(local=command.local)
    check_target(config, submits)
    if command.resume:
        inputs.check_resume(RunDir.open(command.resume), config)
    else:
        inputs.check_run_root(config)
    if not (submits and slurm.sbatch):
        return f"without --dry-run: {rehearsal_line(config)}"
    limits.check_limits(config, layout)
    inputs.check_environment(config)
    return where.test_only(slurm.sbatch, script)


def print_sbatch(command: argparse.Namespace, config: RunConfig, sources: dict[str, str]) -> int:
    """Print nothing but the batch script that would be submitted; make nothing."""
    check_target(config, submits=True)
    config, layout, _ = plan(config, sources, None, download=False)
    limits.check_limits(config, layout)
    inputs.check_environment(config)
    if command.resume:
        inputs.check_resume(RunDir.open(command.resume), config)
    print(batch_script.script_to_submit(config, layout, run_dir_of(command, config)), end="")
    return 0


def run_dir_of(command: argparse.Namespace, config: RunConfig) -> Path:
    """The directory of the run to resume, or the one that a new run would get."""
    if command.resume:
        return RunDir.open(command.resume).path
    run_root = Path(config.cluster.run_root)
    return next(
        path for name in candidate_names(config.name) if not (path := run_root / name).exists()
    )


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of this command, and the flags that set configuration fields."""
    command, flags = make_parser().parse_known_args(argv)
    if command.resume and command.recipe:
        raise RunError("--resume takes the configuration of the run; leave out --recipe")
    return command, flags


class OneLineParser(argparse.ArgumentParser):
    """Raises RunError for what a user mistypes, in place of a usage of many lines."""

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ").replace("expected one", "it needs an")
        message = message.replace("ignored explicit", "it is a switch, which takes no")
        raise RunError(f"{message}; --help lists all flags")


class _Once(argparse.Action):
    """Stores a value, which may be given once."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, value: Any, option: str | None = None
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            raise RunError(f"{option} is given twice; give it once")
        setattr(namespace, self.dest, value)


def make_parser() -> argparse.ArgumentParser:
    """The options of this command; all other flags set configuration fields."""
    parser = OneLineParser("submit_grpo.py", add_help=False, allow_abbrev=False)
    _add_yaml(parser, "--recipe", "an experiment", RECIPES)
    add_target(parser)
    parser.add_argument(
        "--resume",
        metavar="RUN_DIR",
        type=Path,
        action=_Once,
        help="go on with a run after its last checkpoint",
    )
    parser.add_argument(
        "--prepare",
        action="store_true",
        help="make the run directory with job.sbatch in it, print its path and end",
    )
    parser.add_argument(
        "--print-sbatch",
        action="store_true",
        help="print the batch script that would be submitted, and nothing else",
    )
    parser.add_argument(
        "--tune", action="store_true", help="print the five layouts that a model finds fastest"
    )
    parser.add_argument("--verbose", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--sweep",
        metavar="FILE",
        action=_Once,
        help="submit a run for each setting and seed of a YAML file as one job array",
    )
    return parser


def configure(command: argparse.Namespace, flags: list[str]) -> RunConfig:
    """The configuration of the run to resume, else of the recipe, with the flags over it.

    Without a recipe it is the rehearsal's, unless a flag names a checkpoint.
    """
    given = parse_flags(flags)
    refuse_repeated(given)
    if command.resume:
        run = RunDir.open(command.resume)
        config = load(run.config_to_resume(), command.cluster, flags, resumes=True)
        fields = {flag.field for flag in given}
        if "cluster.dependency" not in fields:
            # It was for the first job of the run.
            config = replace(config, cluster=replace(config.cluster, dependency=""))
        return config if "cluster.signal_lead_s" in fields else with_measured_lead(config, run)
    names_model = any(flag.field == "model.hf_checkpoint" for flag in given)
    if command.recipe is None and not names_model:
        command.recipe = RECIPES / "rehearsal.yaml"
        config = load(command.recipe, command.cluster, flags)
        if config.cluster.device == "cuda":
            raise RunError(
                f"no model is named for the GPUs of cluster {config.cluster.name!r}: give "
                "--hf-checkpoint a directory or a hub id (Qwen/Qwen3-4B), or --recipe rehearsal "
                "for its tiny model"
            )
        return config
    return load(command.recipe, command.cluster, flags)


def sources_of(command: argparse.Namespace, flags: list[str]) -> dict[str, str]:
    """Who has set each field of the configuration: a file, or "flag --name"."""
    recipe = RunDir.open(command.resume).config_to_resume() if command.resume else command.recipe
    return set_by(recipe, command.cluster, flags, resumes=bool(command.resume))


def check_target(config: RunConfig, submits: bool) -> None:
    """Refuse a rehearsal of a cluster with GPUs, and a job without time to train."""
    if submits:
        inputs.check_times(config.cluster)
        limits.check_extra_options(config)
    if config.cluster.device == "cuda" and not submits:
        raise RunError(
            f"cluster.gpus_per_node={config.cluster.gpus_per_node}: a rehearsal takes no GPUs; "
            "leave out the cluster file. One machine with GPUs runs `python -m nanoslime.train`"
        )


def rehearsal_line(config: RunConfig) -> str:
    model = "a tiny model" if config.rehearsal.enabled else config.model.hf_checkpoint
    return (
        f"LOCAL REHEARSAL, nothing is submitted: {config.cluster.nodes} simulated node(s) "
        f"on this machine, {model}, CPU"
    )


def submit(config: RunConfig, layout: Layout, resumed: RunDir | None, description: str) -> int:
    """Submits a new or resumed run; one that is refused leaves everything as it was.

    Its files are there before the job, which may start at once.
    """
    submit_by = "submitit" if batch_script.by_submitit(config) else "sbatch"
    submitter = resolve(submit_by, SUBMITTERS, "cluster.submit")
    with prepared(config, layout, resumed) as run:
        job = submitter(config, layout, run)
    print(f"{description}\n\nrun directory: {run.path}")
    print(snapshot.describe(snapshot.newest(run.path)))
    log = f"{run.path}/attempts/latest/logs/driver-0.log"
    print(batch_script.submitted(job, log, typed("jobs/submit_grpo.py", "--resume", run.path)))
    return 0


def prepare(
    command: argparse.Namespace, config: RunConfig, layout: Layout, resumed: RunDir | None
) -> int:
    """Make a run's directory for a person who hands job.sbatch in it to sbatch; print its path, or
    with --print-sbatch that script.
    """
    with prepared(config, layout, resumed) as run:
        script = batch_script.sbatch_text(config, layout, run.path, code=snapshot.newest(run.path))
        publish(run.batch_script, script.encode())
    print(script.removesuffix("\n") if command.print_sbatch else run.path)
    return 0


@contextmanager
def prepared(config: RunConfig, layout: Layout, resumed: RunDir | None) -> Iterator[RunDir]:
    """The directory of a new or resumed run with all that its job reads; all files are as before
    where the block raises.
    """
    run_root = Path(config.cluster.run_root)
    kept = kept_if_accepted(run_root, config.name, resumed, config.cluster.share)
    with alone(resumed), kept as run:
        run.write_config(config, layout)
        write_provenance(run, ["jobs/submit_grpo.py", *sys.argv[1:]])
        snapshot.take(snapshot.next_place(run.path))
        staged_environment.record(config, run)
        yield run


def summary_table(run: RunDir) -> str:
    """The outcome of a run: rewards, seconds, and where everything lies."""
    if not run.summary.exists():
        logs = f"{run.path}/attempts/latest/logs"
        return f"no summary: the run did not reach its end; its logs are in {logs}"
    summary = read_json(run.summary)
    rows = []
    for key, value in summary.items():
        if isinstance(value, float):
            value = f"{value:.4g}"
        if isinstance(value, int | str):
            rows.append(f"{key:16} {value}")
    rows.append(f"{'summary':16} {run.summary}")
    return "\n".join(rows)


def add_target(parser: argparse.ArgumentParser) -> None:
    """The options of all that submits: to which cluster, and whether at all."""
    _add_yaml(parser, "--cluster", "a cluster", *sites.folders())
    parser.add_argument(
        "--local", action="store_true", help="run on this machine, whatever SLURM there is"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print plan and batch script, with --verbose all settings; submit nothing",
    )


def _add_yaml(parser: argparse.ArgumentParser, option: str, what: str, *folders: Path) -> None:
    """An option that takes a YAML file by its path, or by its name in one of `folders`."""

    def find(name: str) -> Path:
        for path in (Path(name), *(folder / f"{name}.yaml" for folder in folders)):
            if path.is_file():
                return path.absolute()
        raise RunError(f"{name}: no such file, and not one of {known}")

    known = ", ".join(sorted({path.stem for folder in folders for path in folder.glob("*.yaml")}))
    text = f"{what}: a YAML file, or one of {known}"
    parser.add_argument(option, metavar="FILE|NAME", type=find, action=_Once, help=text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
