"""submit_grpo.py as a user meets it: plans, refusals, and the files that a submission leaves."""

import json
import re
import resource
import shutil
import struct
import subprocess
import sys
from functools import partial
from math import prod
from pathlib import Path

import pytest

from jobs.checkout import ROOT
from nanoslime.config.load import load, read
from nanoslime.layout import Layout
from nanoslime.models.rules import tensors
from nanoslime.models.shape import ModelShape
from nanoslime.models.tiny import tiny_qwen3_config
from nanoslime.orchestration.launch import parse
from nanoslime.run_dir import RunDir
from nanoslime.types import RunError
from tools.conversion.stream import write_files
from tools.submit import grpo as submit_grpo
from tools.submit import inputs

SCRIPT = ROOT / "jobs/submit_grpo.py"
SBATCH = """#!/bin/sh
case "$1" in
  --version) echo slurm 22.05.8 ;;
  --test-only) /bin/cat > "{folder}/tested"; echo "sbatch: Job 42 to start at noon" >&2 ;;
  --parsable) echo "$@" >> "{folder}/submitted"; echo 42 ;;
  *) echo "$@" >> "{folder}/submitted"; echo Submitted batch job 42 ;;
esac
"""


class Machine:
    """A machine without SLURM until `slurm()`; `submit` runs the command in its own directory."""

    def __init__(self, root: Path, capsys, monkeypatch):
        self.root = root
        self._capsys = capsys
        (root / "bin").mkdir()
        monkeypatch.chdir(root)
        monkeypatch.setenv("PATH", f"{root / 'bin'}:/usr/bin:/bin")

    def slurm(self) -> None:
        for name in ("sbatch", "srun"):
            program = self.root / "bin" / name
            program.write_text(SBATCH.format(folder=self.root))
            program.chmod(0o755)
        squeue = self.root / "bin" / "squeue"
        squeue.write_text("#!/bin/sh\n")
        squeue.chmod(0o755)

    def submit(self, *argv) -> tuple[int, str, str]:
        words = [str(word) for word in argv]
        code = submit_grpo.main(words, {"PATH": str(self.root / "bin")}, self.root)
        shown = self._capsys.readouterr()
        return code, shown.out, shown.err

    def refusal(self, *argv) -> str:
        code, out, err = self.submit(*argv)
        assert (code, out) == (2, "")
        assert not (self.root / "runs").exists()
        return err

    @property
    def submitted(self) -> str:
        file = self.root / "submitted"
        return file.read_text() if file.exists() else ""


@pytest.fixture
def machine(tmp_path, capsys, monkeypatch):
    return Machine(tmp_path, capsys, monkeypatch)


def safetensors(path: Path, name: str = "w") -> None:
    header = json.dumps({name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))


@pytest.fixture
def model(tmp_path):
    directory = tmp_path / "it's a model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(tiny_qwen3_config()))
    (directory / "tokenizer.json").write_text("{}")
    shapes = tensors(ModelShape.read(directory))
    specs = [(name, "F32", shape) for name, shape in shapes.items()]
    write_files(directory, specs, ((name, bytes(4 * prod(shape))) for name, _, shape in specs))
    return directory


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('\n{"prompt": "1+1=", "label": "2"}\n')
    return path


def test_dry_run_on_a_machine_of_ones_own_plans_the_rehearsal_and_leaves_nothing(machine):
    code, out, err = machine.submit("--nodes", "4", "--dry-run")
    assert (code, err) == (0, "")
    assert "Megatron: TP=2 CP=1 PP=2 DP=1" in out
    assert re.search(
        r"^0 +trainer +0-1 .*\n1 +trainer +2-3 .*\n2 +engine .*\n3 +engine ", out, re.MULTILINE
    )
    assert out.startswith("fits; without --dry-run: LOCAL REHEARSAL, nothing is submitted: 4 ")
    assert "80 rollouts" in out
    assert "num_rollout: 80" not in out
    assert "#SBATCH --nodes=4" in out
    assert "without --dry-run: LOCAL REHEARSAL, nothing is submitted: 4 simulated node(s)" in out
    assert sorted(p.name for p in machine.root.iterdir()) == ["bin"]


def test_the_verbose_dry_run_shows_the_whole_configuration(machine):
    _, out, _ = machine.submit("--nodes", "4", "--dry-run", "--verbose")
    assert "num_rollout: 80" in out
    assert "hang_floor_s: 90.0" in out


def test_dry_run_of_one_node_falls_back_to_fsdp(machine):
    _, out, _ = machine.submit("--nodes", "1", "--dry-run")
    assert "FSDP2 (what one node gets without --backend): TP=1 CP=1 PP=1 DP=1" in out
    assert "SGLang: 1 of 1 CPU slot(s) each" in out


def processor_seconds(command: list[str], cwd: Path) -> float:
    """What the command and its children took of the processor, at best of three times."""
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, cwd=cwd, timeout=60, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(spent)


def test_dry_run_takes_far_less_processor_time_than_the_import_of_torch(tmp_path):
    dry_run = [sys.executable, str(SCRIPT), "--nodes", "4", "--dry-run", "--local"]
    torch = [sys.executable, "-c", "import torch"]
    # Measured: 1.1 s to 4.1 s on one machine, 0.7 s to 2.1 s on another.
    assert processor_seconds(dry_run, tmp_path) < 0.6 * processor_seconds(torch, tmp_path)


def test_with_slurm_the_dry_run_asks_sbatch_about_the_same_script(machine):
    machine.slurm()
    code, out, _ = machine.submit("--nodes", "4", "--dry-run")
    assert code == 0
    assert "Job 42 to start at noon" in out
    assert (machine.root / "tested").read_text() in out
    assert machine.submitted == ""


def test_dry_run_says_what_would_be_refused(machine):
    (machine.root / "etc/slurm").mkdir(parents=True)
    code, out, _ = machine.submit("--nodes", "4", "--dry-run")
    assert code == 2
    assert "#SBATCH --nodes=4" in out
    assert out.startswith("would be refused: there is no usable sbatch here")


def test_a_trace_of_slurm_without_sbatch_stops_before_anything_is_made(machine):
    (machine.root / "etc/slurm").mkdir(parents=True)
    said = machine.refusal("--nodes", "4")
    assert said.startswith("submit_grpo: there is no usable sbatch here")
    assert said.count("\n") == 1
    assert "--local" in said


@pytest.mark.parametrize("submitter", ["sbatch", "submitit"])
def test_submission_prints_job_and_directory_and_leaves_what_the_job_reads(
    machine, model, prompts, submitter
):
    machine.slurm()
    inputs_of_run = ["--hf-checkpoint", model, "--prompts", prompts.name]
    place = ["--nodes", 2, "--submit", submitter, "--run-root", "it's; a root", "--name", "mine"]
    code, out, err = machine.submit(*inputs_of_run, *place)
    assert (code, err) == (0, "")
    run = RunDir.open(machine.root / "it's; a root" / "mine")
    assert f"run directory: {run.path}" in out
    assert "submitted job 42" in out
    assert "scancel 42" in out
    assert "driver-0.log" in out
    config = read(run.config)
    assert config.model.hf_checkpoint == str(model)
    assert config.data.prompts == str(prompts)
    assert Layout.from_json(run.plan.read_text()).num_nodes == 2
    assert json.loads(run.provenance.read_text())["versions"]["ray"]
    job = json.loads((run.path / "job.json").read_text())
    assert job == {"job_id": "42", "jobs": ["42"]}
    assert machine.submitted.count("\n") == 1


@pytest.mark.parametrize(
    ("printed", "complaint"),
    [
        ("sbatch: error: no room\nsbatch: error:\nsbatch: error: no room", "no room"),
        ("sbatch: error:\nask your site", "sbatch: error: ask your site"),
    ],
)
def test_a_refusal_of_sbatch_gives_the_reason_in_one_line(machine, printed, complaint):
    machine.slurm()
    sbatch = machine.root / "bin" / "sbatch"
    sbatch.write_text(f"#!/bin/sh\n[ $1 = --version ] && exit\necho '{printed}' >&2\nexit 1\n")
    code, _, err = machine.submit("--nodes", 4, "--submit", "sbatch")
    assert code == 2
    assert err == f"submit_grpo: sbatch refused the job: {complaint}\n"


def refuse(machine) -> None:
    """From now on sbatch refuses every job."""
    sbatch = machine.root / "bin" / "sbatch"
    sbatch.write_text("#!/bin/sh\n[ $1 = --version ] && exit\necho 'error: no' >&2\nexit 1\n")


def files(folder: Path) -> dict[str, bytes]:
    found = sorted(path for path in folder.rglob("[!.]*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.parametrize("submitter", ["sbatch", "submitit"])
def test_a_refused_submission_leaves_nothing(machine, submitter):
    machine.slurm()
    refuse(machine)
    flags = ["--nodes", 4, "--submit", submitter, "--name", "mine"]
    assert "sbatch refused the job" in machine.refusal(*flags)
    (machine.root / "runs").mkdir()
    (machine.root / "runs" / "another").mkdir()
    assert machine.submit(*flags)[0] == 2
    machine.slurm()
    assert machine.submit(*flags)[0] == 0
    assert sorted(p.name for p in (machine.root / "runs").iterdir()) == ["another", "mine"]


@pytest.mark.parametrize("submitter", ["sbatch", "submitit"])
def test_a_refused_resume_leaves_the_run_as_it_was(machine, submitter):
    machine.slurm()
    machine.submit("--nodes", 4, "--submit", "sbatch", "--name", "first")
    run = machine.root / "runs" / "first"
    before = files(run)
    refuse(machine)
    flags = ["--resume", run, "--submit", submitter, "--num-rollout", 200]
    code, out, err = machine.submit(*flags)
    assert (code, out) == (2, "") and "sbatch refused the job" in err
    assert files(run) == before
    assert not (run / "slurm").exists()


def test_a_run_is_not_resumed_with_another_model(machine, model, prompts):
    machine.slurm()
    machine.submit("--nodes", 2, "--hf-checkpoint", model, "--prompts", prompts, "--name", "first")
    run = machine.root / "runs" / "first"
    before = files(run)
    copy = machine.root / "the same elsewhere"
    shutil.copytree(model, copy)
    other = machine.root / "other"
    shutil.copytree(model, other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    for more in ([], ["--dry-run"]):
        code, out, err = machine.submit("--resume", run, "--hf-checkpoint", other, *more)
        assert code == 2
        said = out if more else err
        assert f"{run} trains {model}, and {other} is another model: leave out" in said
    assert files(run) == before
    assert machine.submit("--resume", run, "--hf-checkpoint", copy)[0] == 0


def test_a_model_that_is_gone_cannot_be_compared_with_another(machine, model, prompts):
    machine.slurm()
    old = machine.root / "purged"
    shutil.copytree(model, old)
    machine.submit("--nodes", 2, "--hf-checkpoint", old, "--prompts", prompts, "--name", "first")
    run = machine.root / "runs" / "first"
    # A purge may leave the directory.
    for remove in ((old / "config.json").unlink, partial(shutil.rmtree, old)):
        remove()
        code, _, err = machine.submit("--resume", run, "--hf-checkpoint", model)
        assert code == 2
        assert f"trains {old}, which is gone, so that {model} cannot be compared" in err
    old.symlink_to(model)
    assert machine.submit("--resume", run)[0] == 0


def test_a_run_that_has_a_checkpoint_keeps_its_format_and_its_prompts_in_order(
    machine, model, prompts
):
    machine.slurm()
    machine.submit("--nodes", 2, "--hf-checkpoint", model, "--prompts", prompts, "--name", "first")
    run = machine.root / "runs" / "first"
    other = machine.root / "other.jsonl"
    other.write_text('\n{"prompt": "1+1=", "label": "3"}\n')
    changes = [
        ["--prompts", other],
        ["--seed", 7],
        ["--data.no-shuffle"],
        ["--training.no-distributed-optimizer"],
        ["--backend", "fsdp"],
    ]
    (run / "checkpoints" / "step_1").mkdir()
    for change in changes:
        code, _, err = machine.submit("--resume", run, *change)
        assert code == 2 and "start a new" in err and err.count("\n") == 1
    same = shutil.copy(prompts, machine.root / "same.jsonl")
    assert machine.submit("--resume", run, "--prompts", same)[0] == 0
    (run / "checkpoints" / "step_1").rmdir()
    for change in changes:  # nothing has been trained that they would change
        assert machine.submit("--resume", run, *change)[0] == 0


def test_prepare_prints_nothing_but_the_directory(machine):
    code, out, err = machine.submit("--prepare", "--nodes", "4")
    assert (code, err) == (0, "")
    assert RunDir.open(Path(out.removesuffix("\n"))).config.exists()
    assert machine.submitted == ""


def test_resume_goes_on_in_the_same_directory_with_flags_laid_over(machine):
    machine.slurm()
    machine.submit("--nodes", "4", "--name", "first")
    path = machine.root / "runs" / "first"
    code, out, _ = machine.submit("--resume", path, "--num-rollout", "200")
    assert code == 0
    assert f"run directory: {path}" in out
    assert read(path / "config.yaml").rollout.num_rollout == 200
    assert [p.name for p in (machine.root / "runs").iterdir()] == ["first"]


def test_each_submission_has_a_snapshot_and_only_the_first_one_waits_for_another_job(machine):
    machine.slurm()
    flags = ["--nodes", "4", "--name", "first", "--submit", "sbatch", "--dependency", "afterok:7"]
    assert machine.submit(*flags)[0] == 0
    run = machine.root / "runs" / "first"
    first = (run / "job.sbatch").read_text()
    assert "#SBATCH --dependency=afterok:7\n" in first
    assert f'export PYTHONPATH={run}/code/1"$' in first
    code, out, _ = machine.submit("--resume", run)
    assert code == 0
    assert f"code: {run}/code/2 (sha256 " in out
    assert f"the same as {run}/code/1" in out
    second = (run / "job.sbatch").read_text()
    assert "dependency" not in second
    assert f'export PYTHONPATH={run}/code/2"$' in second
    assert machine.submit("--resume", run, "--dependency", "afterok:8")[0] == 0
    assert "#SBATCH --dependency=afterok:8\n" in (run / "job.sbatch").read_text()


def test_a_run_that_is_prepared_has_the_script_that_a_person_submits(machine):
    """By a plain batch script, whatever submits otherwise."""
    machine.slurm()
    code, printed, err = machine.submit("--nodes", "4", "--print-sbatch")
    assert (code, err) == (0, "")
    assert "submitit.core._submit" in printed
    assert not (machine.root / "runs").exists()
    code, out, err = machine.submit("--nodes", "4", "--prepare", "--print-sbatch")
    assert (code, err) == (0, "")
    run = machine.root / "runs" / "rehearsal"
    assert (run / "job.sbatch").read_text() == out
    assert "-P -m jobs.node" in out
    assert (run / "code" / "1" / "jobs" / "node.py").is_file()
    assert machine.submitted == ""
    assert "rehearsal-2/code/1" in machine.submit("--nodes", "4", "--print-sbatch")[1]


def test_flags_of_a_resume_that_the_run_has_not_taken_are_forgotten(machine):
    """The job fails before its driver could load a checkpoint; then one succeeds."""
    machine.slurm()
    machine.submit("--nodes", "4", "--name", "first")
    run = RunDir.open(machine.root / "runs" / "first")
    machine.submit("--resume", run.path, "--num-rollout", "200")
    assert machine.submit("--resume", run.path, "--lr", "0.5")[0] == 0
    resumed = read(run.config)
    assert (resumed.rollout.num_rollout, resumed.training.lr) == (80, 0.5)
    attempt = run.new_attempt()
    launch = parse(["--run", str(run.path), "--attempt", str(attempt.number)])
    launch.accept()
    assert machine.submit("--resume", run.path)[0] == 0
    assert read(run.config).training.lr == 0.5


def test_resume_refuses_a_run_that_lives_and_takes_one_that_has_left(machine):
    machine.slurm()
    machine.submit("--nodes", "4", "--name", "first")
    run = RunDir.open(machine.root / "runs" / "first")
    attempt = run.new_attempt("42-0")
    attempt.beat(1, 7)
    run.job.rename(run.path / "job.aside")
    code, _, err = machine.submit("--resume", run.path)
    assert code == 2
    assert "is running: node 1 of attempt 1 was alive" in err
    attempt.leave(1)
    assert machine.submit("--resume", run.path)[0] == 0
    # SLURM knows more than heartbeats do.
    attempt.beat(1, 8)
    assert machine.submit("--resume", run.path)[0] == 0


@pytest.mark.parametrize("submitter", ["sbatch", "submitit"])
def test_of_two_resumptions_at_once_one_is_submitted(machine, submitter):
    """The second command waits in front of sbatch until the first has its job."""
    machine.slurm()
    machine.submit("--nodes", "4", "--name", "first", "--submit", submitter)
    (machine.root / "submitted").unlink()
    run = machine.root / "runs" / "first"
    squeue = machine.root / "bin" / "squeue"
    sbatch = machine.root / "bin" / "sbatch"
    marks_job = f'case "$1" in --version) ;; *) /bin/sleep 1; touch "{run}/queued" ;; esac'
    sbatch.write_text(sbatch.read_text().replace("#!/bin/sh", f"#!/bin/sh\n{marks_job}"))
    squeue.write_text(f'#!/bin/sh\n[ ! -e "{run}/queued" ] || echo 42 PENDING Priority\n')
    resume = [sys.executable, str(SCRIPT), "--resume", str(run)]
    pipe = subprocess.PIPE
    both = [subprocess.Popen(resume, stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60) for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], said
    assert sum("job 42 still holds" in err for _, err in said) == 1
    assert len(machine.submitted.splitlines()) == 1
    assert json.loads((run / "job.json").read_text())["job_id"] == "42"


@pytest.mark.parametrize(
    ("site", "says"),
    [
        ("{time_limit_min: 5}", "time_limit_min=5 ends the job after 300 s; .*more than 9 min"),
        ("{time_limit_min: 9, signal_lead_s: 300}", "up to 240 s to commit"),
        ("{time_limit_min: 1, signal_lead_s: 60}", "limit of more than 2 min"),
        ("{extra_sbatch: {time: 1-0}}", "has 'time', .* set cluster.time_limit_min"),
        ("{extra_sbatch: {signal: USR2@9}}", "has 'signal', .* set cluster.signal_lead_s"),
    ],
)
def test_a_job_without_time_to_train_is_refused_with_numbers(machine, site, says):
    machine.slurm()
    cluster = machine.root / "site.yaml"
    cluster.write_text(site.replace("{", "{gpus_per_node: 0, ", 1))
    assert re.search(says, machine.refusal("--nodes", "1", "--cluster", cluster))
    assert machine.submitted == ""
    code, out, _ = machine.submit("--nodes", "1", "--cluster", cluster, "--dry-run")
    assert code == 2
    assert re.search(f"would be refused: .*{says}", out)
    cluster.write_text("{gpus_per_node: 0, time_limit_min: 10}")
    assert machine.submit("--nodes", "1", "--cluster", cluster)[0] == 0


def test_what_cannot_be_resumed_is_refused(machine):
    assert "is not a run directory" in machine.refusal("--resume", machine.root)
    assert "leave out --recipe" in machine.refusal("--resume", machine.root, "--recipe", "mock")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--nodez", "4"], "unknown flag --nodez; did you mean --nodes"),
        (
            ["--tp-size", "3"],
            "training.tp_size=3 does not divide num_attention_heads=4; choose 1 or 2",
        ),
        (
            ["--recipe", "nothere"],
            "nothere: no such file, and not one of colocate, gsm8k, mock, qwen3_0p6b_1node_fsdp",
        ),
        (["--cluster", "nothere"], "not one of h200"),
        (["--recipe", "gsm8k"], "model.hf_checkpoint is not set"),
        (
            ["--recipe", "rehearsal", "--hf-checkpoint", "x"],
            "rehearsal.enabled makes its own model",
        ),
        (["--prompts", "a.jsonl"], "data.prompts='a.jsonl': a rehearsal has prompts of its own"),
        (["--eval-prompts", "a.jsonl"], "no model is named; add --hf-checkpoint, or leave"),
        (
            ["--hf-checkpoint", "/nowhere/at/all"],
            "'/nowhere/at/all' is neither a directory nor a hub id",
        ),
        (["--cluster.gpus-per-node", "8"], "no model is named for the GPUs of cluster 'local'"),
        (
            ["--cluster.gpus-per-node", "8", "--recipe", "rehearsal"],
            "a rehearsal takes no GPUs; leave out the cluster file",
        ),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_nothing(machine, flags, says):
    said = machine.refusal("--nodes", "4", *flags)
    assert says in said
    assert said.count("\n") == 1


def no_config(model):
    (model / "config.json").unlink()


def no_weights(model):
    (model / "model.safetensors").unlink()


def truncated(model):
    with open(model / "model.safetensors", "ab") as file:
        file.truncate(file.tell() - 3)


def shard_missing(model):
    (model / "model.safetensors").unlink()
    safetensors(model / "model-1.safetensors")
    index = {"weight_map": {"w": "model-1.safetensors", "v": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def no_tokenizer(model):
    (model / "tokenizer.json").unlink()


def unknown_architecture(model):
    (model / "config.json").write_text(json.dumps(tiny_qwen3_config() | {"model_type": "gpt17"}))


def test_code_of_the_users_own_is_looked_for_but_not_imported(machine, model, prompts):
    machine.slurm()
    flags = ["--hf-checkpoint", model, "--prompts", prompts]
    settings = {
        "data.reward": "--reward",
        "algorithm.name": "--algorithm",
        "rollout.environment": "--environment",
    }
    for setting, flag in settings.items():
        says = f"{setting}='my_pkg.mine:It': there is no module my_pkg"
        assert says in machine.refusal(*flags, flag, "my_pkg.mine:It")
    package = machine.root / "my_pkg"
    package.mkdir()
    (package / "mine.py").write_text("import torch, no_such_module\n")
    assert "no module my_pkg.yours;" in machine.refusal(*flags, "--reward", "my_pkg.yours:It")
    own = ["--reward", "my_pkg.mine:score", "--algorithm", "my_pkg.mine:It"]
    code, out, _ = machine.submit(*flags, *own, "--dry-run", "--verbose")
    assert code == 0
    assert "name: my_pkg.mine:It" in out


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (no_config, "config.json does not exist"),
        (no_weights, "holds neither model.safetensors nor"),
        (truncated, "model.safetensors is truncated"),
        (shard_missing, "model-2.safetensors is missing"),
        (no_tokenizer, "holds no tokenizer: none of tokenizer.json"),
        (unknown_architecture, "model_type='gpt17' is not supported; known are "),
    ],
)
def test_a_damaged_checkpoint_is_refused_before_submission(machine, model, prompts, damage, says):
    machine.slurm()
    damage(model)
    said = machine.refusal("--hf-checkpoint", model, "--prompts", prompts)
    assert says in said
    assert str(model) in said
    assert said.count("\n") == 1
    assert machine.submitted == ""


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (None, "", "data.prompts is not set: give --prompts FILE"),
        ("none.jsonl", None, "none.jsonl does not exist; set data.prompts"),
        ("a.txt", "x", "choose a file that ends in .jsonl or .parquet"),
        ("a.jsonl", "{broken", "): '{broken'"),
        ("a.jsonl", "[1]", "a.jsonl:1: a JSON object is needed, found list"),
        ("a.jsonl", "\n \n", "a.jsonl holds no prompts"),
        (
            "a.jsonl",
            '{"question": 1, "answer": 2}',
            "a.jsonl:1: no key 'prompt'; set data.prompt_key to one of answer, question",
        ),
        (
            "a.jsonl",
            '\n{"prompt": "1", "answer": 2}',
            "a.jsonl:2: no key 'label'; set data.label_key to one of answer, prompt",
        ),
        ("a.jsonl", '{"prompt": "1", "label": 2}\n{broken', "a.jsonl:2: not a line of JSON"),
        ("a.jsonl", '{"prompt": 1, "label": 2}', "a.jsonl:1: a prompt is a string or a list"),
        ("a.jsonl", '{"prompt": "a", "label": {"x": 2}}', "set data.label_key to label.x"),
        (
            "a.jsonl",
            '{"prompt": [{"role": "user", "content": "a"}], "label": 2}',
            "a.jsonl:1: a prompt of chat messages needs a chat template",
        ),
        ("a.parquet", "no parquet", "a.parquet is not a readable parquet file"),
    ],
)
def test_a_prompt_file_that_cannot_serve_is_refused_before_submission(
    machine, model, name, content, says
):
    machine.slurm()
    (model / "tokenizer_config.json").write_text("{}")
    if content is not None and name:
        (machine.root / name).write_text(content)
    flags = ["--nodes", 2, "--hf-checkpoint", model]
    if name:
        flags += ["--prompts", name]
    said = machine.refusal(*flags)
    assert says in said
    assert said.count("\n") == 1


def test_the_plan_says_what_is_used_of_each_source_and_the_run_reads_local_files(
    machine, model, prompts, monkeypatch
):
    commit = "0123456789abcdef0123456789abcdef01234567"
    dataset = machine.root / "hub" / "datasets--someone--math"
    (dataset / "refs").mkdir(parents=True)
    (dataset / "refs" / "main").write_text(commit)
    snapshot = dataset / "snapshots" / commit
    snapshot.mkdir(parents=True)
    lines = ['{"question": "a", "answer": "1"}', '{"question": "a", "answer": "1"}', "{"]
    (snapshot / "train.jsonl").write_text("\n".join(lines))
    (snapshot / "test.jsonl").write_text('{"prompt": "a", "label": "1"}')
    offline_hub(monkeypatch, dataset.parent)
    machine.slurm()
    source = {"prompts": "someone/math:train", "prompt_key": "question", "label_key": "answer"}
    flags = ["--nodes", 2, "--hf-checkpoint", model, "--submit", "sbatch"]
    flags += ["--data.sources", prompts.name, json.dumps({**source, "weight": 3})]
    flags += ["--eval-prompts", "someone/math:test"]
    assert "train.jsonl:3: not a line of JSON" in machine.refusal(*flags)
    flags += ["--data.broken", "skip"]
    for more in (["--dry-run"], []):
        code, out, _ = machine.submit(*flags, *more)
        assert code == 0
        assert f"prompts   {prompts}: 1 prompts\n" in out
        assert f"\n          {snapshot}:train: 2 prompts; 1 that repeat " in out
        assert f"; 1 broken rows are left out, first: {snapshot}/train.jsonl:3: not a" in out
    config = read(machine.root / "runs" / "run" / "config.yaml")
    by_name = {name: own.prompts for name, own in config.data.by_source().items()}
    assert by_name == {"train": str(prompts), "math": f"{snapshot}:train"}
    assert config.data.eval_prompts == f"{snapshot}:test"


def offline_hub(monkeypatch, cache: Path) -> None:
    """As HF_HUB_CACHE and HF_HUB_OFFLINE in the environment would make it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_hub_id_becomes_a_local_snapshot_and_its_commit(machine, model, prompts, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = machine.root / "hub" / "models--someone--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    (cache / "snapshots").mkdir()
    model.rename(cache / "snapshots" / commit)
    offline_hub(monkeypatch, cache.parent)
    machine.slurm()
    inputs_of_run = ["--hf-checkpoint", "someone/tiny", "--prompts", prompts]
    code, _, _ = machine.submit("--nodes", 2, "--submit", "sbatch", *inputs_of_run)
    assert code == 0
    config = read(machine.root / "runs" / "run" / "config.yaml")
    assert config.model.hf_checkpoint == str(cache / "snapshots" / commit)
    assert config.model.revision == commit


def test_a_hub_id_that_cannot_be_fetched_is_refused(machine, prompts, monkeypatch):
    offline_hub(monkeypatch, machine.root / "hub")
    machine.slurm()
    said = machine.refusal("--hf-checkpoint", "someone/nothing", "--prompts", prompts)
    assert "'someone/nothing' is no directory, and the hub did not give it (" in said
    assert said.count("\n") == 1


@pytest.fixture
def cuda(tmp_path):
    """A checkout with a CUDA lock, and an environment made from it."""
    (tmp_path / "env").mkdir()
    (tmp_path / "env/cuda.lock").write_text("torch==2\n")
    (tmp_path / "venv").mkdir()
    return tmp_path


def stamp(cuda: Path, text: str) -> None:
    (cuda / "venv/.nanoslime-target").write_text(text)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (None, "was not made by env/run.sh"),
        ("target=cpu\nlock_sha256=x\n", "was made from env/cpu.lock. Make it with"),
        ("target=cuda\nlock_sha256=x\n", "was made from env/cuda.lock as it was before"),
    ],
)
def test_gpu_nodes_need_an_environment_from_the_cuda_lock(cuda, made, says):
    if made:
        stamp(cuda, made)
    with pytest.raises(RunError, match=says) as refused:
        inputs.check_environment(gpu_config(cuda / "venv"), cuda)
    assert "bash env/run.sh --target cuda true" in str(refused.value)


def test_an_environment_from_the_cuda_lock_is_taken(cuda):
    command = ["sha256sum", cuda / "env/cuda.lock"]
    answer = subprocess.run(command, capture_output=True, text=True).stdout
    digest = answer.split()[0]
    stamp(cuda, f"target=cuda\nlock_sha256={digest}\ncheckout=x\n")
    inputs.check_environment(gpu_config(cuda / "venv"), cuda)


def gpu_config(venv: Path):
    flags = ["--cluster.gpus-per-node", "8", "--cluster.venv", str(venv)]
    return load(None, None, flags)


def test_a_gpu_cluster_without_its_environment_is_refused_before_submission(machine):
    machine.slurm()
    flags = ["--recipe", "rehearsal", "--run-root", "runs", "--cluster.venv", "none"]
    said = machine.refusal("--cluster", "h200", *flags)
    assert f"cluster 'h200' has GPUs, but cluster.venv ({machine.root}/none) does not exist" in said
    assert machine.submitted == ""


@pytest.mark.parametrize("recipe", ["rehearsal", "mock"])
def test_recipes_that_need_nothing_are_planned(machine, recipe):
    assert machine.submit("--recipe", recipe, "--dry-run")[0] == 0


def test_recipes_for_a_checkpoint_are_planned_on_the_example_cluster(machine, model, prompts):
    prompts.write_text('{"question": "1+1?", "answer": "#### 2"}')
    for recipe in ("gsm8k", "qwen3_4b_h200", "colocate"):
        inputs_of_run = ["--hf-checkpoint", model, "--prompts", prompts]
        flags = ["--recipe", recipe, "--cluster", "h200", "--dry-run"]
        code, out, _ = machine.submit(*flags, *inputs_of_run)
        assert code == 2
        assert "would be refused: there is no usable sbatch" in out
        assert "4 x 8 GPUs; at most 256 GPU hours (32 GPUs for 8 h)" in out


def test_summary_table_shows_what_came_out(tmp_path):
    run = RunDir.create(tmp_path, "r")
    assert "did not reach its end; its logs are in" in submit_grpo.summary_table(run)
    summary = {"reward_before": 0.4, "reward_after": 0.95123, "hf_export": None, "steps": 80}
    run.summary.write_text(json.dumps(summary))
    rows = dict(line.split(maxsplit=1) for line in submit_grpo.summary_table(run).splitlines())
    assert rows == {
        "reward_before": "0.4",
        "reward_after": "0.9512",
        "steps": "80",
        "summary": str(run.summary),
    }


def test_half_a_run_is_planned_from_its_recipe(machine):
    code, out, _ = machine.submit("--recipe", "rollout_only", "--dry-run", "--local")
    assert code == 0
    assert "trainers  none" in out
    assert "SGLang: 1 of 1 CPU slot(s) each" in out
    said = machine.refusal("--recipe", "train_only", "--local")
    assert "rollout.load_rollouts='runs/rollout-only' holds 0 rollouts" in said
    assert "num_rollout=4" in said


def test_training_on_recorded_rollouts_needs_neither_prompts_nor_a_tokenizer(machine, model):
    (model / "tokenizer.json").unlink()
    (machine.root / "old" / "rollouts").mkdir(parents=True)
    for step in range(2):
        (machine.root / "old" / "rollouts" / f"step_{step}-0.npz").touch()
    flags = ["--hf-checkpoint", model, "--load-rollouts", "old"]
    flags += ["--nodes", 1, "--local", "--dry-run", "--verbose"]
    code, out, _ = machine.submit(*flags, "--num-rollout", 2)
    assert code == 0
    assert "engines   none: recorded rollouts" in out
    assert f"load_rollouts: {machine.root}/old/rollouts\n" in out
    said = machine.refusal(*flags, "--num-rollout", 3)
    assert "load_rollouts='old' holds 2 rollouts" in said
    assert "num_rollout=3" in said


def test_a_tokenizer_larger_than_the_model_is_refused_before_submission(machine, model, prompts):
    machine.slurm()
    (model / "tokenizer.json").write_text('{"model": {"vocab": {"a": 320}}}')
    said = machine.refusal("--hf-checkpoint", model, "--prompts", prompts)
    assert "tokenizer.json has 321 tokens, and the model's vocab_size=320 rows" in said


def test_a_field_that_two_flags_set_is_refused(machine):
    said = machine.refusal("--nodes", "4", "--lr", "1e-6", "--training.lr", "1e-5")
    assert "--training.lr sets training.lr, which --lr has set; give one of them" in said


def test_a_prompt_and_response_beyond_the_context_are_refused(machine, model, prompts):
    flags = ["--hf-checkpoint", model, "--prompts", prompts, "--max-new-tokens", "3073"]
    said = machine.refusal(*flags)
    assert "are 4097 tokens together, more than the 4096 that the model reads" in said
    said = machine.refusal("--nodes", "4", "--max-new-tokens", "3073")
    assert "more than the 4096" in said
