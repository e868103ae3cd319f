"""What the README says can be typed and opened: its commands parse and plan, its paths exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nanoslime.config.load import load
from nanoslime.rehearsal import build_tokenizer
from nanoslime.types import RunError
from tools.submit import grpo as submit_grpo

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line
]
SUBMISSIONS = [c for c in COMMANDS if "jobs/submit_grpo.py" in c and "--resume" not in c]
TOOLS = [c for c in COMMANDS if c.startswith("python tools/")]
TRAININGS = [c for c in COMMANDS if c.startswith("python -m nanoslime.train")]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> Path:
    """A directory where the README's models and prompt files are small local ones."""
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "train.jsonl").write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    for name in ("Qwen3-0.6B", "Qwen3-4B"):
        (tmp_path / "Qwen").mkdir(exist_ok=True)
        (tmp_path / "Qwen" / name).symlink_to(tiny_model)
    build_tokenizer().save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_two_commands_are_the_first_and_are_what_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text()
    assert COMMANDS[:2] == [
        "bash env/run.sh python jobs/submit_grpo.py --nodes 4",
        "bash env/run.sh pytest",
    ]
    assert all(command in ci for command in COMMANDS[:2])


@pytest.mark.parametrize("command", SUBMISSIONS)
def test_submissions_plan(command, files, capsys):
    words = shlex.split(command)
    flags = words[words.index("jobs/submit_grpo.py") + 1 :]
    num_nodes = flags[flags.index("--nodes") + 1]
    flags += ["--dry-run", "--cluster.gpu-memory-gib", "140"]
    if "--recipe" in flags and "--cluster" not in flags:
        # On a cluster that init_site.py has described it is found.
        flags += ["--cluster", "h200"]
    code = submit_grpo.main(flags, {"PATH": ""}, files)
    shown = capsys.readouterr().out
    assert f"nodes     {num_nodes} x" in shown
    # A cluster file without sbatch would be refused.
    assert code == (2 if "--cluster" in flags else 0)


@pytest.mark.parametrize("command", TRAININGS)
def test_trainings_are_valid_configurations(command):
    words = [word for word in shlex.split(command)[3:] if word != "--mock"]
    recipe = "jobs/recipes/mock.yaml"
    if not words[0].startswith("--"):
        recipe = words.pop(0)
    config = load(ROOT / recipe, None, words)
    assert config.training.backend == "fsdp"


def test_every_path_exists():
    in_backticks = re.findall(r"`([\w/.]+/[\w.]+\.(?:py|sh|yaml|md|sbatch))`", README)
    links = re.findall(r"\]\(([^)]+)\)", README)
    words = [word for command in COMMANDS for word in shlex.split(command)]
    in_commands = [word for word in words if re.match(r"(jobs|env|nanoslime)/", word)]
    named = in_backticks + links + in_commands
    assert len(named) > 30
    missing = [name for name in named if not (ROOT / name).exists()]
    # It is written by a run of all tests, and a fresh checkout may be without it.
    assert set(missing) <= {"tests/RESULTS.md"}


def test_every_flag_exists():
    """The flags in backticks exist. Their values may be refused."""
    own = {
        "dry-run",
        "verbose",
        "tune",
        "logits",
        "mock",
        "require-slurm",
        "target",
        "help",
        "nproc-per-node",
        "section.field",
        "cluster",
        "best",
        "group",
        "status",
        "run-root",
        "role",
        "rank",
        "attempt",
        "grep",
        "tail",
        "follow",
        "print",
        "overlap",
        "hours",
        "wait",
        "yes",
        "print-sbatch",
        "prepare",
        "local",
        "recipe",
        "sweep",
        "max-running",
        "only",
    }
    text = re.sub(r"```bash.*?```", "", README, flags=re.DOTALL)
    in_backticks = " ".join(re.findall(r"`([^`]*)`", text))
    named = set(re.findall(r"--([a-z][\w.-]+)", in_backticks))
    assert len(named) > 20
    for flag in sorted(named - own):
        try:
            load(None, None, [f"--{flag}=1"])
        except RunError as error:
            assert "unknown flag" not in str(error)


@pytest.mark.parametrize("command", TOOLS)
def test_tools_take_the_arguments_that_are_shown(command):
    program, *arguments = shlex.split(command)[1:]
    help_command = [sys.executable, program, "--help"]
    shown = subprocess.run(help_command, cwd=ROOT, capture_output=True, text=True)
    assert " ".join(arguments) in shown.stdout
