"""submit_convert.py as a user meets it: batch script, refusals, submission, local conversion."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.checkout import ROOT
from nanoslime.config.load import load
from nanoslime.types import RunError
from tests.jobs.made_run import HOSTILE
from tools.conversion import job

SCRIPT = ROOT / "jobs" / "submit_convert.py"
SBATCH = """#!/bin/sh
case "$1" in
  --version) echo slurm 22.05.8 ;;
  --test-only) /bin/cat > "{folder}/tested"; echo "sbatch: Job 42 to start at noon" >&2 ;;
  *) echo "$@" > "{folder}/asked"; /bin/cat > "{folder}/submitted"; echo "42;cluster" ;;
esac
"""


REFUSING_SBATCH = """#!/bin/sh
[ "$1" = --version ] && exit 0
/bin/cat > /dev/null
echo "error: no room\nsbatch: error: none at all" >&2
exit 1
"""


class Login:
    """A machine without SLURM until `slurm()`; `submit` runs the command in its own directory."""

    def __init__(self, root: Path, capsys, monkeypatch):
        self.root = root
        self._capsys = capsys
        (root / "bin").mkdir()
        monkeypatch.chdir(root)

    def slurm(self, program: str = SBATCH) -> None:
        sbatch = self.root / "bin" / "sbatch"
        sbatch.write_text(program.format(folder=self.root))
        sbatch.chmod(0o755)

    def submit(self, *argv: str | Path) -> tuple[int, str, str]:
        environ = {"PATH": str(self.root / "bin")}
        code = job.main([str(a) for a in argv], environ, self.root)
        shown = self._capsys.readouterr()
        return code, shown.out, shown.err

    def refusal(self, *argv: str | Path) -> str:
        code, out, err = self.submit(*argv)
        assert (code, out) == (2, "")
        assert err.startswith("submit_convert: ")
        assert not (self.root / "submitted").exists()
        return err

    @property
    def submitted(self) -> str:
        return (self.root / "submitted").read_text()


@pytest.fixture
def login(tmp_path, capsys, monkeypatch):
    return Login(tmp_path, capsys, monkeypatch)


def batch(
    *argv: str | Path, cluster: str = "", log: str = "/out.slurm-", folder: str = "/here"
) -> str:
    """The script that a command and the text of a cluster file lead to."""
    if cluster:
        Path("cluster.yaml").write_text(cluster)
        argv += ("--cluster", "cluster.yaml")
    command = job.parse([str(a) for a in argv])
    config = load(None, command.cluster, command.flags)
    return job.sbatch_text(command, config, log, Path(folder), Path(f"{log}code-1"))


def asked(script: str) -> dict[str, str]:
    """The options in a batch script, without their quotes."""
    options = {}
    for line in script.splitlines():
        if line.startswith("#SBATCH --"):
            name, _, value = line.removeprefix("#SBATCH --").partition("=")
            options[name] = "".join(shlex.split(value))
    return options


def test_the_job_is_one_task_that_slurm_may_requeue_and_asks_for_no_gpu(login):
    script = batch("hf-to-megatron", "/a", "/b")
    assert asked(script) == {
        "job-name": "hf-to-megatron",
        "nodes": "1",
        "ntasks": "1",
        "cpus-per-task": "8",
        "time": "240",
        "requeue": "",
        "open-mode": "append",
        "output": "/out.slurm-%j.out",
    }
    code = "/out.slurm-code-1"
    last, clean = script.splitlines()[-1].split(" && ")
    words = [sys.executable, f"{code}/tools/hf_to_megatron.py", "/a", "/b", "--threads", "8"]
    assert shlex.split(last) == words
    assert clean == f"rm -rf -- {code}"
    assert f"\nexport PYTHONPATH={code}" in script


def test_the_cluster_file_says_where_and_how_and_has_the_last_word(login):
    cluster = """
partition: cpu
account: team
time_limit_min: 90
cpus_per_node: 4
gpus_per_node: 8
memory_per_node: 1400G
extra_sbatch: {gpus: "1", exclusive: "", output: elsewhere}
setup: [module load python]
env: {KEY: "a b; c"}
venv: envs/shared
"""
    script = batch("megatron-to-hf", "a", "b", "--time-limit-min", "30", cluster=cluster)
    given = asked(script)
    assert given["partition"] == "cpu"
    assert given["account"] == "team"
    assert given["time"] == "30"
    assert given["cpus-per-task"] == "4"
    assert given["gpus"] == "1"
    assert given["exclusive"] == ""
    assert given["output"] == "/out.slurm-%j.out"
    assert "mem" not in given
    assert "gpus-per-node" not in given
    lines = script.splitlines()
    setup = lines.index("module load python")
    export = lines.index("export KEY='a b; c'")
    assert setup < export < lines.index("cd /here")
    assert lines[-1].startswith(f"{login.root}/envs/shared/bin/python ")
    script = batch("megatron-to-hf", "a", "b", "--partition=other", cluster=cluster)
    assert asked(script)["partition"] == "other"


@pytest.mark.parametrize("name", [HOSTILE, "50% off", "a'; echo foo", "two\nlines"])
def test_hostile_paths_stay_one_word(login, name):
    options = ["--hf-checkpoint", f"{name}/hf", "--dtype", "BF16"]
    folder = f"/x/{name}"
    script = batch("megatron-to-hf", name, "b", *options, log="/logs/it's 50% ", folder=folder)
    words = script[script.index(f"\n{sys.executable} ") :].rpartition(" && ")[0]
    paths = [f"{login.root}/{name}", f"{login.root}/b"]
    assert shlex.split(words)[2:] == [*paths, "--threads", "8", *options]
    assert f"\ncd {shlex.quote(folder)}\n" in script
    assert asked(script)["output"] == "/logs/it's 50%% %j.out"
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("log", ["/a\nrm -rf b", "/a\\b"])
def test_a_log_that_slurm_would_lose_is_refused(login, log):
    with pytest.raises(RunError, match="line break or a backslash"):
        batch("hf-to-megatron", "/a", "/b", log=log)


def test_threads_follow_the_cores_unless_the_tool_is_told(login):
    command = job.parse(["hf-to-megatron", "a", "b", "--threads=3", "--cpus", "2"])
    assert job.tool_words(command, "python", 2)[4:] == ["--threads", "2", "--threads=3"]
    command = job.parse(["verify-checkpoint", "a", "b", "--logits", "--cpus", "2"])
    assert job.tool_words(command, "python", 2)[4:] == ["--logits"]


@pytest.mark.parametrize("tool", job.TOOLS)
def test_every_tool_exists_and_takes_what_is_passed_to_it(tool, tmp_path):
    paths = [f"none{directory}" for directory in job.TOOLS[tool].split()]
    command = job.parse([tool, *paths])
    words = job.tool_words(command, sys.executable, 1)
    if command.is_conversion:
        words.append("--dry-run")
    environ = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run(words, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "none" in done.stderr
    assert "usage" not in done.stderr


def test_submission_shows_plan_and_job_and_where_its_log_is(login, tiny_model):
    login.slurm()
    code, out, err = login.submit("hf-to-megatron", tiny_model, "new/it's out", "--cpus", "2")
    assert (code, err) == (0, "")
    assert "model    qwen3" in out
    assert f"write    {login.root}/new/it's out (" in out
    log = f"{login.root}/new/it's out.slurm-42.out"
    *_, submitted, state, follow, stop, resume = out.splitlines()
    assert submitted == "submitted job 42"
    assert shlex.split(follow) == ["follow", "tail", "-F", log]
    assert state.split() == ["state", "squeue", "-j", "42"]
    assert stop.split() == ["stop", "scancel", "42"]
    assert "same command" in resume
    assert asked(login.submitted)["output"] == log.replace("slurm-42", "slurm-%j")
    assert (login.root / "asked").read_text() == "--parsable\n"
    [code] = (login.root / "new").iterdir()
    assert code.name == "it's out.slurm-code-1"
    assert f"{shlex.quote(str(code / 'tools/hf_to_megatron.py'))} " in login.submitted
    assert (code / "nanoslime" / "__init__.py").exists()


def test_dry_run_shows_the_plan_and_the_script_that_sbatch_was_asked_about(login, tiny_model):
    login.slurm()
    code, out, _ = login.submit("hf-to-megatron", tiny_model, "new/out", "--dry-run")
    assert code == 0
    assert "model    qwen3" in out
    assert "Job 42 to start at noon" in out
    assert (login.root / "tested").read_text() in out
    assert sorted(path.name for path in login.root.iterdir()) == ["bin", "tested"]


def test_dry_run_without_slurm_says_that_it_would_run_here(login, tiny_model):
    code, out, _ = login.submit("hf-to-megatron", tiny_model, "out", "--dry-run")
    assert code == 0
    assert "#SBATCH --nodes=1" in out
    assert "without --dry-run: LOCAL, nothing is submitted" in out
    assert [path.name for path in login.root.iterdir()] == ["bin"]


def test_what_the_tool_refuses_is_shown_and_not_submitted(login, tiny_model):
    login.slurm()
    (login.root / "taken").mkdir()
    said = login.refusal("hf-to-megatron", tiny_model, "taken")
    assert "taken exists; choose another output" in said
    said = login.refusal("hf-to-megatron", tiny_model, "out", "--dtype", "BF16")
    assert "unrecognized arguments: --dtype BF16" in said
    assert "no directory" in login.refusal("verify-checkpoint", tiny_model, "nowhere")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["hf-to-megatron", "one"], "hf-to-megatron takes HF_DIR OUT"),
        (["inspect-checkpoint", "one", "two"], "inspect-checkpoint takes DIR"),
        (["hf-to-megatron", "a", "b", "--time-limit-min", "0"], "cluster.time_limit_min='0'"),
        (["hf-to-megatron", "a", "b", "--cluster", "nothere"], "not one of h200"),
    ],
)
def test_bad_input_ends_in_one_line(login, words, says):
    said = login.refusal(*words)
    assert says in said
    assert said.count("\n") == 1


def refused_after_the_plan(login, *argv: str | Path) -> str:
    code, _, err = login.submit(*argv)
    assert code == 2
    assert not (login.root / "submitted").exists()
    return err


def test_an_environment_that_is_not_there_is_refused(login, tiny_model):
    login.slurm()
    (login.root / "cluster.yaml").write_text("{gpus_per_node: 0, venv: none}")
    command = ["hf-to-megatron", tiny_model, "out", "--cluster", "cluster.yaml"]
    said = refused_after_the_plan(login, *command)
    assert f"cluster.venv: there is no {login.root}/none/bin/python" in said


def test_a_log_that_cannot_be_written_is_refused(login, tiny_model):
    login.slurm()
    (login.root / "file").write_text("")
    said = refused_after_the_plan(login, "hf-to-megatron", tiny_model, "file/out")
    assert "file cannot be written" in said


def test_what_sbatch_says_is_one_line(login, tiny_model):
    login.slurm(REFUSING_SBATCH)
    said = refused_after_the_plan(login, "hf-to-megatron", tiny_model, "out")
    assert said == "submit_convert: sbatch refused the job: no room; none at all\n"
    assert [path.name for path in login.root.iterdir()] == ["bin"]


def test_a_trace_of_slurm_without_sbatch_stops(login, tiny_model):
    (login.root / "etc/slurm").mkdir(parents=True)
    assert "there is no usable sbatch here" in login.refusal("hf-to-megatron", tiny_model, "out")


def here(folder: Path, *argv: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, argv), "--local"]
    environ = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    return subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, timeout=60
    )


def test_a_conversion_runs_here_both_ways_and_says_so_first(tmp_path, tiny_model):
    folder = tmp_path / HOSTILE
    folder.mkdir()
    made = here(folder, "hf-to-megatron", tiny_model, "it's mcore", "--cpus", "1")
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith(
        "LOCAL, nothing is submitted: hf-to-megatron runs on this machine\n"
    )
    assert here(folder, "megatron-to-hf", "it's mcore", "back").returncode == 0
    original, back = (path / "model.safetensors" for path in (tiny_model, folder / "back"))
    assert back.read_bytes() == original.read_bytes()
    assert "equal, bit for bit" in here(folder, "verify-checkpoint", "it's mcore", "back").stdout
    again = here(folder, "hf-to-megatron", tiny_model, "it's mcore")
    assert again.returncode == 2
    assert "it's mcore exists" in again.stderr
