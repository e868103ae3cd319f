"""The first hour on a cluster: short runs from one device to four nodes, each only if the one below
it passed, and a report without names of hosts, users and places.

    python3 jobs/acceptance.py --cluster mysite          submits a rung, waits, looks, goes on
    python3 jobs/acceptance.py --local                   the same on this machine, without SLURM
    python3 jobs/acceptance.py --max-nodes 2             not higher than two nodes
    python3 jobs/acceptance.py --up-to node-megatron     not higher than this rung
    python3 jobs/acceptance.py --hf-checkpoint M --prompts P    with a model, and not a tiny one

A rung's job ends after ten minutes at the latest. Each shows that trainer and engine agree
(parity), that engines have the trainer's weights (sync), that a checkpoint is whole (save), that a
run whose driver gets SIGKILL goes on by itself (kill and resume), what the network gives
(bandwidth) and what a trainer takes beside what was planned (memory). All other flags are those of
jobs/submit_grpo.py and hold for all rungs, but for the layouts that rungs are. The report is
acceptance.json and acceptance.txt below --report DIR, written anew after each rung.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from nanoslime.config.flags import HELP
from nanoslime.storage.shared_files import publish
from nanoslime.types import RunError
from tools.acceptance.ladder import Site, climb, interrupt_by_signals, nodes_of
from tools.acceptance.report import Report
from tools.acceptance.rungs import take_tiny_model
from tools.submit import grpo as submit_grpo
from tools.submit import where


def main(argv: list[str]) -> int:
    """The exit code: 0 where all rungs that the site can have passed, 1 where one failed, 2 where
    the ladder could not begin.
    """
    if HELP & set(argv):
        print(__doc__)
        return 0
    try:
        asked, rest = _parse(argv)
        site = _site(asked, rest)
        interrupt_by_signals()
        asked.report.mkdir(parents=True, exist_ok=True)

        def keep(report: Report) -> None:
            content = json.dumps(report.content(), indent=1)
            publish(asked.report / "acceptance.json", content.encode())
            publish(asked.report / "acceptance.txt", report.text().encode())

        report = climb(site, lambda text: print(text, flush=True), keep)
    except (RunError, OSError, ValueError) as error:
        print(f"acceptance: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("acceptance: interrupted; the job of its rung is cancelled", file=sys.stderr)
        return 130
    print(f"\n{report.text()}\nreport: {asked.report}/acceptance.txt and acceptance.json")
    return 0 if report.is_good else 1


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser("acceptance.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--report", type=Path, default=Path("acceptance"))
    parser.add_argument("--max-nodes", type=int)
    parser.add_argument("--up-to", default="")
    parser.add_argument("--patience-min", type=float, default=120.0)
    return parser.parse_known_args(argv)


def _site(asked: argparse.Namespace, rest: list[str]) -> Site:
    command, flags = submit_grpo.parse(rest)
    for option in ("resume", "prepare", "print_sbatch", "dry_run", "sweep"):
        if getattr(command, option):
            raise RunError(f"--{option.replace('_', '-')} is for one run; leave it out here")
    environ = os.environ
    submit_grpo.find_cluster(command, environ)
    slurm = where.detect(environ.get("PATH", ""), environ, Path("/"), command.cluster)
    submits = slurm.has_slurm(local=command.local)
    take_tiny_model(command, flags)
    cluster = submit_grpo.configure(command, flags).cluster
    found = nodes_of(cluster.partition) if submits else None
    limits = [number for number in (asked.max_nodes, found) if number is not None]
    patience_s = asked.patience_min * 60
    return Site(command, flags, submits, min(limits, default=None), patience_s, asked.up_to)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
