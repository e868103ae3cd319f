"""The whole stack as a user starts it: submit_grpo.py, node agents, Ray, Megatron,
SGLang, and how it dies.

Each run is a child process; every wait has a deadline, and nothing may be left of it.
"""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nanoslime.models.tiny import BOS, EOS, PAD, VOCAB_SIZE, digit_problems
from nanoslime.rehearsal import build_tokenizer
from nanoslime.run_dir import STOPPED, RunDir
from tests import process_table, strangers
from tests.jobs.made_run import scratches
from tests.models.hf import save_model

REPOSITORY = Path(__file__).parents[2]
pytestmark = [pytest.mark.ray, pytest.mark.megatron, pytest.mark.timeout(600)]


class Rehearsal:
    """`submit_grpo.py --local` as a child; its output is read while it runs.

    Its first fault ends it, unless a flag says how often it may go on.
    """

    def __init__(self, root: Path, *flags: str):
        command = [sys.executable, "jobs/submit_grpo.py", "--local", "--run-root", str(root)]
        command += flags
        if "--cluster.max-requeues" not in flags:
            command += ["--cluster.max-requeues", "0"]
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.root = root
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def run(self) -> RunDir:
        return RunDir.open(self.root / "rehearsal")

    def says(self, text: str) -> bool:
        return any(text in line for line in self.lines)

    def wait_for_line(self, text: str, deadline_s: float = 400) -> None:
        process_table.wait_for(
            lambda: self.says(text) or self.process.poll() is not None, deadline_s
        )
        assert self.says(text), f"no {text!r} in:\n" + "".join(self.lines)

    def wait(self, deadline_s: float = 400) -> int:
        code = self.process.wait(deadline_s)
        self._reader.join(10)
        return code

    def pid_of(self, *words: str) -> int:
        """The process of this rehearsal whose command line has all these words."""
        family = process_table.descendants(self.process.pid, process_table.all_processes())
        [pid] = [p.pid for p in family if all(word in p.command for word in words)]
        return pid


@pytest.fixture
def start(tmp_path: Path, no_leftovers: None) -> Iterator:
    started = []

    def begin(*flags: str) -> Rehearsal:
        started.append(Rehearsal(tmp_path, *flags))
        return started[-1]

    yield begin
    for rehearsal in started:
        if rehearsal.process.poll() is None:
            rehearsal.process.send_signal(signal.SIGTERM)
            rehearsal.process.wait(60)


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def log_names(run: RunDir) -> set[str]:
    return {path.name for path in (run.attempts / "1" / "logs").iterdir()}


@pytest.mark.sglang
def test_the_main_job_on_four_simulated_nodes(start):
    rehearsal = start("--nodes", "4", "--num-rollout", "2", "--eval.max-prompts", "50")
    assert rehearsal.wait(280) == 0, "".join(rehearsal.lines)
    run = rehearsal.run
    assert rehearsal.lines[0].startswith("LOCAL REHEARSAL")
    for step in (1, 2):
        [line] = [line for line in rehearsal.lines if line.startswith(f"step {step}/2")]
        for word in ("reward", "kl", "gap", "generate", "train", "weight_sync"):
            assert word in line
    summary = json.loads(run.summary.read_text())
    assert 0.2 < summary["reward_before"] < 0.6 and summary["logprob_gap_max"] < 1e-4
    phases = {"model", "start", "evaluate", "generate", "train", "weight_sync"}
    assert set(summary["phase_s"]) >= phases
    logs = log_names(run)
    assert {f"trainer-{rank}.log" for rank in range(4)} <= logs
    assert {"sglang-0.log", "sglang-1.log", "driver-0.log"} <= logs
    assert {"worker-0.log", "worker-1.log"} <= logs
    assert not any("trainer-4" in name or "sglang-2" in name for name in logs)
    assert list(run.tensorboard.glob("events.out.tfevents.*"))
    by_worker = [json_lines(run.rollouts / f"step_1-{worker}.jsonl") for worker in range(2)]
    assert all(by_worker)
    samples = [sample for samples in by_worker for sample in samples]
    assert len(samples) == 64 * 8
    assert {version for sample in samples for _, version in sample["versions"]} == {1}
    exported = load_file(Path(summary["hf_export"]) / "model.safetensors")
    before = load_file(run.model / "model" / "model.safetensors")
    assert exported.keys() == before.keys()
    assert all(not exported[name].equal(before[name]) for name in exported if "proj" in name)
    AutoModelForCausalLM.from_pretrained(summary["hf_export"])


@pytest.mark.sglang
def test_trainers_and_engines_share_two_nodes(start):
    """A Megatron stage and an SGLang engine take turns on the slot of each node, with a
    checkpoint in between.
    """
    flags = ["--nodes", "2", "--colocate", "--num-rollout", "2", "--save-interval", "1"]
    flags += ["--cluster.slots-per-node", "1", "--tp-size", "1"]
    rehearsal = start(*flags, "--eval.max-prompts", "20")
    assert rehearsal.wait(280) == 0, "".join(rehearsal.lines)
    run = rehearsal.run
    text = "".join(rehearsal.lines)
    assert "one of the two sleeps" in text and text.count("trainer+engine") == 2
    rows = json_lines(run.metrics)
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert row["time/sleep_s"] > 0 and row["time/wake_s"] > 0
        assert row["train/logprob_gap_max"] < 1e-4
        assert 0.2 < row["rollout/reward_mean"] < 0.8
    summary = json.loads(run.summary.read_text())
    assert summary["reward_before"] is not None and summary["reward_after"] is not None
    assert load_file(Path(summary["hf_export"]) / "model.safetensors")


def test_one_node_falls_back_to_fsdp_and_commits_though_sigterm_comes_to_all_its_processes(start):
    """FSDP2 on the node's slots; the embedded engine leaves all of them to trainers.

    SLURM without cgroups signals every process of a job.
    """
    flags = ["--nodes", "1", "--num-rollout", "1000", "--engine", "embedded"]
    rehearsal = start(*flags, "--eval.max-prompts", "20", "--save-interval", "1000")
    rehearsal.wait_for_line("step 1/1000")
    assert rehearsal.says("FSDP")
    main = psutil.Process(rehearsal.process.pid)
    for process in [main, *main.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM)
    assert rehearsal.wait(90) == STOPPED, "".join(rehearsal.lines)
    run = rehearsal.run
    rows = json_lines(run.metrics)
    assert max(row["train/logprob_gap_max"] for row in rows) < 1e-4
    assert run.checkpoint(len(rows)).is_dir()
    assert run.attempt(1).ended() == (STOPPED, "SIGTERM at node0")
    assert run.status()["phase"] == "stopped"


@pytest.mark.matrix
@pytest.mark.sglang
def test_half_a_run_each_from_its_recipe(start, tmp_path):
    """SGLang without a trainer, then two FSDP ranks without an engine, on what was recorded."""
    flags = ["--recipe", "rollout_only", "--num-rollout", "2", "--eval.max-prompts", "20"]
    sampling = start(*flags)
    assert sampling.wait(280) == 0, "".join(sampling.lines)
    sampled = RunDir.open(tmp_path / "rollout-only")
    flags = ["--recipe", "train_only", "--num-rollout", "2", "--load-rollouts", str(sampled.path)]
    training = start(*flags)
    assert training.wait(280) == 0, "".join(training.lines)
    trained = RunDir.open(tmp_path / "train-only")
    assert "sglang-0.log" in log_names(sampled)
    assert {"trainer-0.log", "trainer-1.log"} <= log_names(trained)
    assert not any(name.startswith("trainer") for name in log_names(sampled))
    assert not any(name.startswith(("sglang", "worker")) for name in log_names(trained))
    sampled_rows = json_lines(sampled.metrics)
    trained_rows = json_lines(trained.metrics)
    for before, after in zip(sampled_rows, trained_rows, strict=True):
        assert before["rollout/reward_mean"] == after["rollout/reward_mean"]
    gaps = [row["train/logprob_gap_max"] for row in trained_rows]
    assert gaps[0] < 1e-4 < gaps[1]


@pytest.mark.matrix
@pytest.mark.sglang
def test_ranks_that_share_experts_replay_what_the_engines_chose(start, tmp_path):
    """Qwen3-MoE over EP 2, two SGLang engines, R3; random weights are rewarded for
    nothing but entropy.
    """
    model = tmp_path / "model"
    prompts = tmp_path / "prompts.jsonl"
    tokens = dict(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    save_model(model, "qwen3_moe", vocab_size=VOCAB_SIZE, **tokens)
    build_tokenizer().save_pretrained(model)
    problems, _ = digit_problems("reverse", seed=0, num_held_out=1)
    prompts.write_text("".join(json.dumps(problem._asdict()) + "\n" for problem in problems))
    flags = ["--hf-checkpoint", str(model), "--prompts", str(prompts), "--dtype", "float32"]
    flags += "--nodes 2 --tp-size 1 --pp-size 1 --ep-size 2 --training.routing-replay R3".split()
    flags += "--num-rollout 3 --rollout-batch-size 16 --n-samples-per-prompt 4".split()
    flags += "--max-new-tokens 16 --data.max-prompt-tokens 32 --entropy-coef 0.05".split()
    flags += ["--algorithm.no-filter-zero-std"]
    rehearsal = start(*flags, "--lr", "1e-3", "--name", "rehearsal")
    assert rehearsal.wait(280) == 0, "".join(rehearsal.lines)
    rows = json_lines(rehearsal.run.metrics)
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert row["train/logprob_gap_max"] < 1e-4 and row["train/grad_norm"] > 0
        assert row["train/routing_mismatch_ratio"] < 0.01  # rounding may decide a tie


def test_a_killed_trainer_rank_ends_the_run_with_its_name(start):
    flags = ["--nodes", "2", "--pp-size", "1", "--engine", "embedded", "--num-rollout", "1000"]
    rehearsal = start(*flags, "--eval.max-prompts", "8")
    rehearsal.wait_for_line("step 1/1000")
    log = rehearsal.run.attempt(1).log("trainer", 1).read_text()
    [pid] = re.findall(r"trainer rank 1 of .* pid (\d+)", log)
    os.kill(int(pid), signal.SIGKILL)
    assert rehearsal.wait(90) == 1
    [line] = [line for line in rehearsal.lines if "died" in line and line.startswith("failed:")]
    assert "trainer rank 1 on node 0" in line and "trainer-1.log" in line
    assert rehearsal.run.status()["phase"] == "failed"


def check_environments(run: RunDir, server_pid: int) -> None:
    """NCCL and gloo are told the same in a server, in what it starts, and in the ranks."""
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE")
    expected = dict(zip(names, ("lo", "lo", "0", "0"), strict=True))
    for rank in range(2):
        log = run.attempt(1).log("trainer", rank).read_text()
        [told] = re.findall(r"environment: ({.*})", log)
        assert ast.literal_eval(told).items() >= expected.items()
    server = psutil.Process(server_pid)
    environments = [process.environ() for process in (server, *server.children(recursive=True))]
    # A process that has given itself a title has none any more.
    found = [{name: one.get(name) for name in names} for one in environments if "PATH" in one]
    assert found and all(one == expected for one in found)


def check_strangers(rehearsal: Rehearsal, scratch: list[Path]) -> None:
    """Another user of the machine finds no port that does what he says, and no directory."""
    processes = psutil.Process(rehearsal.process.pid).children(recursive=True)
    by_process: dict[str, set[str]] = {}
    for one, answer in strangers.knock(strangers.listeners(processes)):
        process = one.process.split()[0].split(".")[0]  # Ray adds the method that runs just now
        assert "/ray/autoscaler/" not in one.process  # its port is open to everybody
        if answer not in strangers.REFUSED:
            by_process.setdefault(process, set()).add(answer)
            assert one.address.startswith("127."), one
        elif "sglang.launch_server" in one.process:
            assert answer == "HTTP 401" and one.address.startswith("127.")
    # TCPStores and gloo ask nobody for a secret: the rest that the README names.
    assert by_process == dict.fromkeys(("ray::RankActor", "sglang::scheduler"), {strangers.UNKNOWN})
    if os.getuid() == 0:
        assert strangers.entered([rehearsal.run.path, *scratch]) == []
    assert all(path.stat().st_mode & 0o777 == 0o700 for path in scratch)


def check_secrets(rehearsal: Rehearsal, secrets: list[str], scratch: list[Path]) -> None:
    """They are in two files of this user's, and in no command line."""
    logs = "rehearsal/attempts/1/logs"
    expected = {"rehearsal/attempts/1/ray_token": 0o600, f"{logs}/engine_key.yaml": 0o600}
    assert strangers.files_with(secrets, [rehearsal.root, *scratch]) == expected
    if rehearsal.process.poll() is None:
        for process in psutil.Process(rehearsal.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                command = " ".join(process.cmdline())
                assert not any(secret in command for secret in secrets)
    assert not any(secret in line for secret in secrets for line in rehearsal.lines)


@pytest.mark.sglang
def test_a_killed_engine_comes_back_and_ends_the_run_when_it_may_not(start, monkeypatch):
    canaries = {
        "HF_TOKEN": "canary-of-the-hub",
        "WANDB_API_KEY": "canary-of-the-tracker" + "0" * 19,
    }
    for name, canary in canaries.items():
        monkeypatch.setenv(name, canary)
    flags = ["--nodes", "2", "--pp-size", "1", "--num-rollout", "1000"]
    flags += ["--rollout.engine-restarts", "1"]
    rehearsal = start(*flags, "--eval.max-prompts", "8")
    rehearsal.wait_for_line("step 1/1000")
    server = rehearsal.pid_of("sglang.launch_server")
    check_environments(rehearsal.run, server)
    attempt = rehearsal.run.attempt(1)
    scratch = scratches(rehearsal.root)
    assert len(scratch) == 2
    key = json.loads(attempt.log("sglang", 0).with_name("engine_key.yaml").read_text())["api-key"]
    secrets = [*canaries.values(), attempt.ray_token.read_text(), key]
    check_strangers(rehearsal, scratch)
    check_secrets(rehearsal, secrets, scratch)
    os.kill(server, signal.SIGKILL)
    rehearsal.wait_for_line("engine engine-0 is up again")
    num_lines = len(rehearsal.lines)
    process_table.wait_for(
        lambda: any(line.startswith("step ") for line in rehearsal.lines[num_lines:]), 90
    )
    assert rehearsal.process.poll() is None, "".join(rehearsal.lines)
    os.kill(rehearsal.pid_of("sglang.launch_server"), signal.SIGKILL)
    assert rehearsal.wait(90) == 1
    assert rehearsal.says("no engine is left") and rehearsal.says("sglang-0.log")
    check_secrets(rehearsal, secrets, [])
    assert scratches(rehearsal.root) == []
