"""Watches the runs of a user, looks into them, and ends them.

    python3 jobs/runs.py ps                      a line for each run of the run root
    python3 jobs/runs.py status RUN              step, phase, seconds, reward, hours, attempts
    python3 jobs/runs.py top [RUN]               ps, or status, again and again
    python3 jobs/runs.py logs RUN --role trainer --grep Error --follow
    python3 jobs/runs.py attach RUN --node n2    a shell inside the job
    python3 jobs/runs.py tunnel RUN              commands to paste on your own machine
    python3 jobs/runs.py stop RUN                it commits and ends, and its job is cancelled
    python3 jobs/runs.py report RUN              all of it as one HTML page
    python3 jobs/runs.py samples RUN --worst 3   recorded samples, token by token
    python3 jobs/runs.py sync RUN                uploads to W&B what was logged offline
    python3 jobs/runs.py compare SWEEP|RUN...    a row for each setting, over its seeds

RUN is a run's directory, or its name below the run root; ps, top and stop take a sweep as well.
The run may live, have ended or have never started; only `stop` and `sync` write into its directory.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from nanoslime.config.load import load
from nanoslime.types import RunError
from tools.submit import sites
from tools.sweep import compare, table
from tools.watch import control, report, run_logs, samples
from tools.watch.status import RunStatus, damage_named, subjects

_RUN_ROOT = "where runs lie; default: as the cluster's file says, else runs"
_CLEAR = "\x1b[H\x1b[2J"
# What a line of `ps` tells.
_LINE = ("state", "step", "reward", "ETA", "hours")


def main(argv: list[str]) -> int:
    asked = _parser().parse_args(argv)
    try:
        if asked.run_root is None:
            asked.run_root = default_run_root()
        if asked.run is not None:
            asked.run = _found(asked.run, asked.run_root)
        asked.runs = [_found(run, asked.run_root) for run in asked.runs]
        for text in asked.show(asked):
            print(text, flush=True)
    except (RunError, OSError) as e:
        print(e, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def default_run_root() -> Path:
    """The run root of the cluster on which this is typed, if its file is stored; else `runs`.

    A SLURM that does not answer is no reason to show nothing.
    """
    with suppress(RunError):
        file = sites.of_this_machine(os.environ)
        if file is not None:
            return Path(load(None, file, []).cluster.run_root or "runs").expanduser()
    return Path("runs")


def _found(run: Path, run_root: Path) -> Path:
    """A name is that of a run or sweep below the run root, unless there is one here."""
    is_here = (run / "attempts").is_dir() or table.is_sweep(run)
    return run if is_here else run_root / run


def _ps(asked: argparse.Namespace) -> Iterator[str]:
    paths = [asked.run]
    if asked.run is None:
        kinds = ("attempts", table.TABLE)
        paths = sorted(path.parent for kind in kinds for path in asked.run_root.glob(f"*/{kind}"))
    for path in paths:
        if table.is_sweep(path) and (damage := table.damage(path)):
            yield f"{path.name:24}  {damage}; the runs that lie there are shown all the same"
    paths = table.runs_of(paths)
    if not paths:
        raise RunError(f"{asked.run_root} holds no run; give another --run-root DIR")
    for path in paths:
        try:
            told = _told(path)
        except RunError as error:
            if path == asked.run:
                raise
            # The other runs are shown all the same.
            yield f"{path.name:24}  {error}"
            continue
        yield f"{path.name:24}  {'; '.join(told[label] for label in _LINE if label in told)}"


def _told(path: Path) -> dict[str, str]:
    """What a person is told of a run, by its subjects."""
    with damage_named(path):
        return dict(subjects(RunStatus(path)))


def _status(asked: argparse.Namespace) -> Iterator[str]:
    for label, text in _told(asked.run).items():
        yield f"{label:9} {text}"


def _stop(asked: argparse.Namespace) -> Iterator[str]:
    """All runs of a sweep, those first that wait: none begins while others end.

    All that run are asked before the first one is waited for, so that they end together.
    """
    if not table.is_sweep(asked.run):
        yield from control.stop(asked)
        return
    runs = table.runs_of([asked.run])
    if not runs:
        raise RunError(f"{asked.run} has no run to stop: all were deleted")
    waiting: list[tuple[Path, Iterator[str]]] = []
    running: list[tuple[Path, Iterator[str]]] = []
    for run in runs:
        of_run = argparse.Namespace(**{**vars(asked), "run": run})
        try:
            group = running if RunStatus(run).runs else waiting
        except RunError as error:
            yield f"{run.name}: {error}"
            continue
        group.append((run, control.stop(of_run)))
    stops = [*waiting, *running]
    # The first that a run's stop tells is that the run is asked, or that its job is cancelled.
    for num_texts in (1, None):
        for run, texts in stops:
            try:
                for text in islice(texts, num_texts):
                    yield f"{run.name}: {text}"
            except RunError as error:
                yield f"{run.name}: {error}"


def _top(asked: argparse.Namespace) -> Iterator[str]:
    has_many = asked.run is None or table.is_sweep(asked.run)
    show = _ps if has_many else _status
    while True:
        yield "\n".join([_CLEAR, *show(asked)])
        time.sleep(asked.every)


_COMMANDS = {
    "ps": (_ps, "a line for each run of the run root"),
    "status": (_status, "step, phase, seconds, reward, ETA, hours and attempts"),
    "top": (_top, "ps, or status of a run, again and again"),
    "logs": (run_logs.show, "the logs of all processes, merged by time"),
    "attach": (control.attach, "a shell inside the run's allocation"),
    "tunnel": (control.tunnel, "a command that leads to TensorBoard, for your own machine"),
    "stop": (_stop, "the run commits and ends, and its job is cancelled"),
    "report": (report.write, "writes all of it as one HTML page, which needs no network"),
    "samples": (samples.show, "recorded samples, each token coloured by its gap"),
    "sync": (control.sync, "uploads to W&B what was logged offline; may be repeated"),
    "compare": (compare.show, "mean and standard error of rewards over the seeds of each setting"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jobs/runs.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    made = {}
    for name, (show, summary) in _COMMANDS.items():
        made[name] = commands.add_parser(name, help=summary, description=summary)
        nargs = "?" if name in ("ps", "top") else None
        made[name].set_defaults(run=None, runs=[])
        if name == "compare":
            made[name].add_argument("runs", type=Path, metavar="SWEEP|RUN", nargs="+")
        else:
            made[name].add_argument("run", type=Path, metavar="RUN", nargs=nargs)
        made[name].add_argument("--run-root", type=Path, metavar="DIR", help=_RUN_ROOT)
        made[name].set_defaults(show=show)
    samples.add_options(made["samples"])
    run_logs.add_options(made["logs"])
    made["top"].add_argument("--every", type=float, default=5.0, metavar="S", help="seconds (5)")
    made["attach"].add_argument("--node", help="the node's name; default: the job's first")
    made["attach"].add_argument("--print", action="store_true", help="only print the command")
    made["stop"].add_argument(
        "--wait", type=float, default=600.0, metavar="S", help="seconds (600)"
    )
    made["report"].add_argument("--out", type=Path, metavar="FILE", help="default: NAME.html, here")
    return parser


if __name__ == "__main__":
    # Whoever reads may stop to, as head and less do.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main(sys.argv[1:]))
