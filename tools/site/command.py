"""Describes the cluster that this machine belongs to, once, in a file that later commands find.

    python3 jobs/init_site.py            asks up to four questions; Enter takes what is in brackets
    python3 jobs/init_site.py --yes      asks none
    python3 jobs/init_site.py --print    prints the file and stores nothing

SLURM says most of it: partitions, nodes, limits, your accounts. A small srun asks a node for its
network interfaces, HCAs, disks and GPUs. The file is stored by SLURM's name of the cluster in
$XDG_CONFIG_HOME/nanoslime/clusters (~/.config/nanoslime/clusters), where submit_grpo.py finds it
without --cluster. An earlier file stays beside it as NAME.yaml.old.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from jobs.checkout import made_by, shown, stored_clusters, typed
from nanoslime.config.load import load
from nanoslime.types import RunError
from tools.site.cluster_file import Request, text
from tools.site.node_facts import ask_node
from tools.site.questions import Answers, Given, Person, ask_person, max_time_min
from tools.site.slurm import ask_cluster, ask_share, try_job

_MAX_NODES_SHOWN = 4


def main(argv: list[str]) -> int:
    asked = _parser().parse_args(argv)
    try:
        return run(asked)
    except (RunError, OSError) as error:
        print(f"init_site: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("init_site: interrupted, nothing is stored", file=sys.stderr)
        return 130


def run(asked: argparse.Namespace) -> int:
    cluster = ask_cluster()
    # With --print the file alone is the output.
    notes = sys.stderr if asked.print else sys.stdout
    print(f"cluster {cluster.name}", file=notes, flush=True)
    given = Given(asked.partition, asked.account, asked.run_root, asked.venv)
    person = Person(answers=not asked.yes)
    answers = ask_person(cluster, person, given)
    share = ask_share(cluster, answers.partition, answers.kind)
    request = Request(cluster, answers, max_time_min(cluster, answers), share)
    _refuse_what_slurm_refuses(request)
    node = ask_node(_small_job(answers), srun=not asked.no_srun)
    if not node.is_node:
        print(
            f"no node could be asked ({node.why_not}): interfaces, HCAs, disks and GPU memory are "
            f"those of this machine, {node.host}; look at them in the file",
            file=notes,
        )
    content = text(request, node)
    file = stored_clusters() / f"{cluster.name}.yaml"
    _check(content)
    if asked.print:
        print(content, end="")
        return 0
    store(file, content)
    print(f"\n{content}\nstored as {file}")
    print(_next_steps(answers))
    return 0


def _small_job(answers: Answers) -> list[str]:
    """The options of a job that a node is asked by: a core, and a GPU where there are some."""
    options = [f"--partition={answers.partition.name}"]
    if answers.account:
        options.append(f"--account={answers.account}")
    if answers.qos:
        options.append(f"--qos={answers.qos}")
    if answers.kind.gpus:
        kind = f"{answers.kind.gpu_type}:" if answers.kind.gpu_type else ""
        options.append(f"--gres=gpu:{kind}1")
    return options


def _refuse_what_slurm_refuses(request: Request) -> None:
    """Raises RunError where SLURM would not take a job that takes all of a node."""
    answers = request.answers
    options = [option for option in _small_job(answers) if not option.startswith("--gres")]
    options += [
        "--nodes=1",
        f"--time={request.time_limit_min}",
        f"--cpus-per-task={request.share.cpus}",
        "--requeue",
    ]
    if request.share.memory_mb > 1:
        options.append(f"--mem={request.share.memory_mb}M")
    if answers.kind.gpus:
        options.append(f"--gpus-per-node={answers.kind.gpus}")
    refusal = try_job(options)
    if refusal:
        raise RunError(
            f"SLURM would refuse a job by these answers, and nothing is stored: {refusal} (sbatch "
            f"--test-only {' '.join(options)}); choose another --partition or --account"
        )


def _check(content: str) -> None:
    """Raises RunError where the file is none of ours."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "cluster.yaml")
        file.write_text(content, encoding="utf-8")
        load(None, file, [])


def store(file: Path, content: str) -> None:
    """Writes the file whole or not at all; an earlier one stays beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        os.replace(file, file.with_name(f"{file.name}.old"))
    new = file.with_name(f"{file.name}.new")
    new.write_text(content, encoding="utf-8")
    os.replace(new, file)


def _next_steps(answers: Answers) -> str:
    """What may be typed now."""
    lines = []
    if not (answers.venv / "bin/python").exists():
        target = "cuda" if answers.kind.gpus else "cpu"
        lines += [f"the environment {shown(answers.venv)} is made by", f"    {made_by(target)}"]
    nodes = min(answers.kind.count, _MAX_NODES_SHOWN)
    if nodes < _MAX_NODES_SHOWN and not answers.kind.gpus:
        # The rehearsal's layout is for four nodes, or for one.
        nodes = 1
    words = ["--nodes", str(nodes)]
    if answers.kind.gpus:
        words += ["--hf-checkpoint", "MODEL", "--prompts", "PROMPTS.jsonl", "--dry-run"]
    lines += [
        "a first run (--dry-run shows its plan):",
        f"    {typed('jobs/submit_grpo.py', *words)}",
    ]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="init_site.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--yes", action="store_true", help="take all defaults; ask nothing")
    parser.add_argument("--print", action="store_true", help="print the file; store nothing")
    parser.add_argument("--no-srun", action="store_true", help="ask this machine, and no node")
    parser.add_argument("--partition", default="", help="the partition of jobs")
    parser.add_argument("--account", default="", help="the account that pays for jobs")
    parser.add_argument("--run-root", default="", metavar="DIR", help="the directory of runs")
    parser.add_argument("--venv", default="", metavar="DIR", help="the environment of the nodes")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
