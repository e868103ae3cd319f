"""Plans a GRPO run, checks it, and submits it to SLURM; where nothing of SLURM exists, it is rehearsed here.

    recipe + cluster file + flags -> configuration -> plan -> checks -> run directory -> job or rehearsal

Deliberately not here: what runs inside the job (jobs/node.py), and torch. A plan takes less than a second.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from jobs import executor, inputs, where
from nanoslime import layout as layouts
from nanoslime.config import RunConfig
from nanoslime.config.flags import parse as parse_flags
from nanoslime.config.load import dump, load
from nanoslime.layout import Layout
from nanoslime.plugins import resolve
from nanoslime.run_dir import RunDir
from nanoslime.storage.shared_files import publish, read_json
from nanoslime.types import RunError

RECIPES = executor.ROOT / "jobs" / "recipes"
CLUSTERS = executor.ROOT / "env" / "clusters"
SUBMITTERS = {
    "submitit": "jobs.slurm_submit:submit_submitit",
    "sbatch": "jobs.slurm_submit:submit_sbatch",
}
_HELP = {"-h", "--help"}


def main(argv: list[str], environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> int:
    """The exit code: 0 submitted or ended well, 2 refused, else that of the rehearsal."""
    try:
        command, flags = parse(argv)
        config = configure(command, flags)
        return run(
            command, config, where.detect(environ.get("PATH", ""), environ, root, command.cluster)
        )
    except RunError as e:
        print(f"submit_grpo: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a plan or of the help, `| head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def run(command: argparse.Namespace, config: RunConfig, slurm: where.Where) -> int:
    """From the configuration to a job id, a rehearsal's end, or a printed plan."""
    if command.dry_run:
        return dry_run(command, config, slurm)
    submits = command.prepare or slurm.has_slurm(local=command.local)
    check_target(config, submits)
    config, shape = inputs.resolve(config, download=True)
    layout = layouts.plan(config, shape)
    if submits:
        inputs.check_environment(config)
    else:
        print(rehearsal_line(config), flush=True)
    run = open_run(command, config, layout)
    if command.prepare:
        print(run.path)
        return 0
    print(f"{layouts.describe(config, shape, layout)}\n\nrun directory: {run.path}", flush=True)
    if submits:
        return submit(config, layout, run)
    code = executor.run_local(config, layout, run)
    print(summary_table(run))
    return code


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """What this command takes, and the flags that set configuration fields."""
    what = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(
        "submit_grpo.py", description=what, add_help=False, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--recipe",
        metavar="FILE|NAME",
        help=f"an experiment: a YAML file, or one of {_names(RECIPES)}",
    )
    add(
        "--cluster",
        metavar="FILE|NAME",
        help=f"a cluster: a YAML file, or one of {_names(CLUSTERS)}",
    )
    add("--local", action="store_true", help="rehearse on this machine, whatever SLURM there is")
    add(
        "--dry-run",
        action="store_true",
        help="print plan, configuration and batch script; submit nothing",
    )
    add("--resume", metavar="RUN_DIR", type=Path, help="go on with a run after its last checkpoint")
    add("--prepare", action="store_true", help="make the run directory, print its path and end")
    command, flags = parser.parse_known_args(argv)
    if command.resume and command.recipe:
        raise RunError("--resume takes the configuration of the run; leave out --recipe")
    command.recipe, command.cluster = (
        yaml_file(command.recipe, RECIPES),
        yaml_file(command.cluster, CLUSTERS),
    )
    if _HELP & set(flags):
        parser.print_help()
    return command, flags


def configure(command: argparse.Namespace, flags: list[str]) -> RunConfig:
    """The run's own configuration, the recipe's, or without either the rehearsal's, and flags over it."""
    if command.resume:
        return load(RunDir.open(command.resume).config, command.cluster, flags)
    given = command.recipe or _HELP & set(flags)
    given = given or "model.hf_checkpoint" in {flag.field for flag in parse_flags(flags)}
    return load(command.recipe if given else RECIPES / "rehearsal.yaml", command.cluster, flags)


def check_target(config: RunConfig, submits: bool) -> None:
    if not submits and config.cluster.device == "cuda":
        given = f"cluster.gpus_per_node={config.cluster.gpus_per_node}: a rehearsal takes no GPUs"
        way_out = (
            "leave out the cluster file. One machine with GPUs runs `python -m nanoslime.train`"
        )
        raise RunError(f"{given}; {way_out}")


def rehearsal_line(config: RunConfig) -> str:
    model = "a tiny model" if config.rehearsal.enabled else config.model.hf_checkpoint
    nodes = config.cluster.nodes
    return f"LOCAL REHEARSAL, nothing is submitted: {nodes} simulated node(s) on this machine, {model}, CPU"


def open_run(command: argparse.Namespace, config: RunConfig, layout: Layout) -> RunDir:
    """A new run directory, or the one to go on with, holding what every process of the run reads."""
    if command.resume:
        run = RunDir.open(command.resume)
        inputs.refuse_if_running(run)
    else:
        run = RunDir.create(Path(config.cluster.run_root), config.name)
    publish(run.config, dump(config).encode())
    publish(run.plan, layout.to_json().encode())
    run.write_provenance(sys.argv)
    return run


def submit(config: RunConfig, layout: Layout, run: RunDir) -> int:
    job = resolve(config.cluster.submit, SUBMITTERS, "cluster.submit")(config, layout, run)
    log = f"{run.path}/attempts/latest/logs/driver-0.log"
    print(executor.submitted(job, log, f"python jobs/submit_grpo.py --resume {run.path}"))
    return 0


def summary_table(run: RunDir) -> str:
    """What came out of a run: reward before and after, seconds, and where everything lies."""
    if not run.summary.exists():
        return f"no summary: the run did not reach its end; its logs are in {run.path}/attempts/latest/logs"
    summary = read_json(run.summary)
    keys = ["reward_before", "reward_after", "steps", "seconds", "logprob_gap_max"]
    keys += ["checkpoint", "hf_export", "tensorboard"]
    rows = [(key, summary.get(key)) for key in keys] + [("summary", run.summary)]
    shown = [(key, f"{value:.4g}" if isinstance(value, float) else value) for key, value in rows]
    return "\n".join(f"{key:16} {value}" for key, value in shown if value is not None)


def dry_run(command: argparse.Namespace, config: RunConfig, slurm: where.Where) -> int:
    """Plan, configuration and batch script; what would be refused later is said, and is the exit code."""
    config, shape = inputs.resolve(config, download=False)
    layout = layouts.plan(config, shape)
    run_dir = command.resume or Path(config.cluster.run_root) / config.name
    script = executor.sbatch_text(config, layout, run_dir)
    print(f"--- plan\n{layouts.describe(config, shape, layout)}\n")
    print(f"--- configuration\n{dump(config)}\n--- batch script\n{script}")
    print("--- checks")
    try:
        submits = slurm.has_slurm(local=command.local)
        check_target(config, submits)
        if submits and slurm.sbatch:
            inputs.check_environment(config)
            print(where.test_only(slurm.sbatch, script))
        else:
            print(f"without --dry-run: {rehearsal_line(config)}")
    except RunError as e:
        print(f"would be refused: {e}")
        return 2
    return 0


def yaml_file(name: str | None, folder: Path) -> Path | None:
    """A YAML file by its path, or by its name in `folder`."""
    if name is None:
        return None
    for path in (Path(name), folder / f"{name}.yaml"):
        if path.is_file():
            return path.absolute()
    raise RunError(f"{name}: no such file, and not one of {_names(folder)}")


def _names(folder: Path) -> str:
    return ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
