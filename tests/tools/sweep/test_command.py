"""Sweeps as a user submits them: planned, refused, and what a submission leaves."""

import json
import subprocess
from pathlib import Path

import pytest

from nanoslime.config.load import read
from nanoslime.run_dir import DONE, FAILED, STOPPED, RunDir
from tools.submit import grpo as submit_grpo
from tools.submit import local
from tools.sweep import command, table

SWEEP = """
name: learning
grid: {lr: [1e-3, 2e-3]}
seeds: 2
"""
SBATCH = """#!/bin/sh
case "$1" in
  --version) echo slurm 22.05.8 ;;
  --test-only) /bin/cat > "{folder}/tested"; echo "sbatch: Job 42 to start at noon" >&2 ;;
  *) /bin/cat > "{folder}/script"; {answer} ;;
esac
"""


class Machine:
    """A machine whose programs are the test's own."""

    def __init__(self, root: Path, capsys, monkeypatch):
        self.root = root
        self._capsys = capsys
        self.sweep = root / "sweep.yaml"
        self.sweep.write_text(SWEEP)
        (root / "bin").mkdir()
        monkeypatch.chdir(root)
        monkeypatch.setenv("PATH", f"{root / 'bin'}:/usr/bin:/bin")

    def slurm(self, answer: str = "echo 42") -> None:
        texts = {"sbatch": SBATCH.format(folder=self.root, answer=answer), "srun": "#!/bin/sh\n"}
        for name, text in {**texts, "squeue": "#!/bin/sh\n"}.items():
            program = self.root / "bin" / name
            program.write_text(text)
            program.chmod(0o755)

    def submit(self, *argv) -> tuple[int, str, str]:
        words = ["--sweep", str(self.sweep), *map(str, argv)]
        code = command.main(words, {"PATH": str(self.root / "bin")}, self.root)
        shown = self._capsys.readouterr()
        return code, shown.out, shown.err

    def refusal(self, *argv) -> str:
        code, out, err = self.submit(*argv)
        assert (code, out) == (2, "")
        assert not (self.root / "runs").exists()
        return err

    @property
    def directory(self) -> Path:
        return self.root / "runs" / "learning"


@pytest.fixture
def machine(tmp_path, capsys, monkeypatch):
    return Machine(tmp_path, capsys, monkeypatch)


def test_a_submission_is_one_array_with_a_run_and_a_seed_for_each_element(machine):
    machine.slurm()
    code, out, err = machine.submit("--max-running", "3", "--nodes", "2", "--pp-size", "1")
    assert (code, err) == (0, "")
    assert "submitted job 42" in out and f"runs.py compare {machine.directory}" in out
    rows = table.read(machine.directory).rows
    assert [(row.run, row.setting, row.seed) for row in rows] == [
        ("learning-0", "lr=1e-3", 0),
        ("learning-1", "lr=1e-3", 1),
        ("learning-2", "lr=2e-3", 0),
        ("learning-3", "lr=2e-3", 1),
    ]
    for row in rows:
        run = RunDir.open(machine.directory / row.run)
        config = read(run.config)
        assert (config.name, config.seed) == (row.run, row.seed)
        assert config.training.lr == float(row.setting.removeprefix("lr="))
        assert json.loads(run.job.read_text())["job_id"] == f"42_{row.index}"
        assert str(run.path) in run.batch_script.read_text()
        assert run.plan.exists() and run.provenance.exists()
    script = (machine.root / "script").read_text()
    assert script == (machine.directory / "array.sbatch").read_text()
    lines = script.splitlines()
    assert "#SBATCH --array=0-3%3" in lines
    assert "#SBATCH --nodes=2" in lines
    assert sum(line.startswith("#SBATCH --job-name") for line in lines) == 1
    assert sum(line.startswith("#SBATCH --output") for line in lines) == 1
    assert "srun" not in script


@pytest.mark.parametrize("index", [0, 3])
def test_a_task_of_the_array_runs_its_elements_own_script(machine, index):
    """Also in a directory whose name a shell would take apart."""
    machine.slurm()
    hostile = machine.root / 'it\'s a; echo "x" %j'
    assert machine.submit("--run-root", hostile)[0] == 0
    run = hostile / "learning" / f"learning-{index}"
    (run / "job.sbatch").write_text('echo "$0" "$SLURM_ARRAY_TASK_ID"\n')
    variables = {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_JOB_ID": "7", "PATH": "/usr/bin:/bin"}
    subprocess.run(["bash", machine.root / "script"], env=variables, check=True)
    assert (run / "slurm-7.out").read_text() == f"{run}/job.sbatch {index}\n"


def test_a_refused_element_refuses_the_sweep_and_is_named(machine):
    machine.slurm()
    machine.sweep.write_text("grid: {tp_size: [1, 3]}\nseeds: [5]")
    error = machine.refusal("--nodes", "2", "--pp-size", "1")
    assert "element 1 (tp_size=3; seed 5): " in error
    assert "element 0" not in error
    assert not (machine.root / "script").exists()


@pytest.mark.parametrize(
    ("text", "flags", "says"),
    [
        ("grid: {lrr: [1]}", (), "unknown flag --lrr; did you mean --lr?"),
        ("grid: {lr: [fast]}", (), "training.lr='fast'"),
        ("grid: {lr: [1]}", ("--lr", "2"), "--lr sets training.lr"),
        ("grid: {lr: [1]}\nseeds: 2", ("--seed", "2"), "--seed and the sweep's seeds"),
        ("grid: {lr: [1]}", ("--prepare",), "--prepare is for one run"),
        ("grid: {lr: [1]}", ("--resume", "runs/x"), "--resume is for one run"),
        ("grid: {lr: [1]}", ("--only", "0"), "has no sweep in"),
        ("grid: {lr: [1", (), "is not YAML"),
        ("grid: {cluster.nodes: [2, 4]}", (), "asks SLURM for --nodes=4"),
    ],
)
def test_what_cannot_be_a_sweep_is_refused_in_words(machine, text, flags, says):
    machine.slurm()
    machine.sweep.write_text(text)
    assert says in machine.refusal("--pp-size", "1", *flags)


def test_a_missing_file_and_a_sweep_that_slurm_refuses_leave_nothing(machine):
    machine.slurm("echo 'sbatch: error: Invalid job array specification' >&2; exit 1")
    assert "Invalid job array specification" in machine.refusal()
    machine.sweep.unlink()
    assert "cannot read the sweep file" in machine.refusal()


def test_a_dry_run_shows_elements_and_script_and_leaves_nothing(machine):
    machine.slurm()
    code, out, err = machine.submit("--dry-run")
    assert (code, err) == (0, "")
    assert "element 3 (lr=2e-3; seed 1)" in out
    assert (machine.root / "tested").read_text() in out
    assert "Job 42 to start at noon" in out
    assert not (machine.root / "runs").exists()


def test_one_element_goes_on_alone_in_its_own_directory(machine, monkeypatch):
    machine.slurm()
    assert machine.submit("--cluster.submit", "sbatch")[0] == 0
    run = machine.directory / "learning-1"
    for sweep in (machine.sweep, machine.directory):
        machine.sweep = sweep
        code, out, err = machine.submit("--only", "1", "--num-rollout", "7")
        assert (code, err) == (0, "")
        assert f"run directory: {run}" in out
    assert read(run / "config.yaml").rollout.num_rollout == 7
    assert json.loads((run / "job.json").read_text())["job_id"] == "42"
    assert "it has 0 to 3" in machine.submit("--only", "4")[2]


def test_without_slurm_elements_run_one_after_the_other(machine, monkeypatch):
    """One that fails does not keep the others from running, one that is stopped does."""
    codes = [FAILED, DONE, STOPPED, DONE]
    ran = []

    def run_local(config, layout, run):
        ran.append((run.name, config.seed))
        return codes[len(ran) - 1]

    monkeypatch.setattr(local, "run_local", run_local)
    code, out, err = machine.submit()
    assert (code, err) == (STOPPED, "")
    assert ran == [("learning-0", 0), ("learning-1", 1), ("learning-2", 0)]
    assert "element 2 (lr=2e-3; seed 0): LOCAL REHEARSAL" in out
    assert "setting" in out.splitlines()[-3]


def test_submit_grpo_hands_a_sweep_over(machine, monkeypatch):
    calls = []
    monkeypatch.setattr(submit_grpo.os, "execve", lambda *args: calls.append(args))
    monkeypatch.setattr(submit_grpo, "run", lambda *args: 0)
    submit_grpo.main(["--sweep", "sweep.yaml", "--local", "--dry-run", "--nodes", "1"])
    [(_, words, environ)] = calls
    assert words[1:4] == ["-m", "tools.sweep.command", "--sweep"]
    assert environ["PYTHONPATH"]
