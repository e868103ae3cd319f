"""What the README says can be typed and opened: its commands parse and plan, its paths exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import submit_grpo
from nanoslime.config.load import load
from nanoslime.rehearsal import build_tokenizer
from nanoslime.types import RunError

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
    """A directory in which the README's names of models and prompt files lead to small local ones."""
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
    nodes = flags[flags.index("--nodes") + 1]
    code = submit_grpo.main(
        [*flags, "--dry-run", "--cluster.gpu-memory-gib", "140"], {"PATH": ""}, files
    )
    shown = capsys.readouterr().out
    assert f"nodes     {nodes} x" in shown
    assert code == (
        2 if "--cluster" in flags else 0
    )  # a cluster file without sbatch would be refused


@pytest.mark.parametrize("command", TRAININGS)
def test_trainings_are_valid_configurations(command):
    words = [w for w in shlex.split(command)[3:] if w != "--mock"]
    recipe = (
        ROOT / words.pop(0) if not words[0].startswith("--") else ROOT / "jobs/recipes/mock.yaml"
    )
    config = load(recipe, None, words)
    assert config.training.backend == "fsdp"


def test_every_path_exists():
    named = re.findall(r"`([\w/.]+/[\w.]+\.(?:py|sh|yaml|md|sbatch))`", README) + re.findall(
        r"\]\(([^)]+)\)", README
    )
    named += [w for c in COMMANDS for w in shlex.split(c) if re.match(r"(jobs|env|nanoslime)/", w)]
    assert len(named) > 30
    missing = [name for name in named if not (ROOT / name).exists()]
    assert (
        missing == ["tests/RESULTS.md"]
        if not (ROOT / "tests/RESULTS.md").exists()
        else missing == []
    )


def test_every_flag_exists():
    """Those in the text, in backticks. Their values may be refused."""
    own = {
        "dry-run",
        "logits",
        "mock",
        "require-slurm",
        "target",
        "help",
        "nproc-per-node",
        "section.field",
        "cluster",
    }
    code = " ".join(re.findall(r"`([^`]*)`", re.sub(r"```bash.*?```", "", README, flags=re.DOTALL)))
    named = set(re.findall(r"--([a-z][\w.-]+)", code))
    assert len(named) > 20
    for flag in sorted(named - own):
        try:
            load(None, None, ["--" + flag + "=1"])
        except RunError as e:
            assert "unknown flag" not in str(e)


@pytest.mark.parametrize("command", TOOLS)
def test_tools_take_the_arguments_that_are_shown(command):
    program, *arguments = shlex.split(command)[1:]
    shown = subprocess.run(
        [sys.executable, program, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert " ".join(arguments) in shown.stdout
