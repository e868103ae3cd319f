"""The whole stack as a user starts it: submit_grpo.py, node agents, Ray, Megatron, SGLang, and how it dies.

Each run is a child process; every wait has a deadline, and nothing may be left of it.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nanoslime.models.tiny import BOS, EOS, PAD, VOCAB_SIZE, digit_problems
from nanoslime.rehearsal import build_tokenizer
from nanoslime.run_dir import RunDir
from tests import process_table
from tests.models.hf import save_model

REPOSITORY = Path(__file__).parents[2]
pytestmark = [pytest.mark.ray, pytest.mark.megatron]


class Rehearsal:
    """`submit_grpo.py --local` as a child; its output is read while it runs."""

    def __init__(self, root: Path, *flags: str):
        command = [
            sys.executable,
            "jobs/submit_grpo.py",
            "--local",
            "--run-root",
            str(root),
            *flags,
        ]
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.root, self.lines = root, list[str]()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines += iter(self.process.stdout.readline, "")

    @property
    def run(self) -> RunDir:
        return RunDir.open(self.root / "rehearsal")

    def wait_for_line(self, text: str, deadline_s: float = 240) -> None:
        found = process_table.wait_for(
            lambda: any(text in line for line in self.lines) or self.process.poll() is not None,
            deadline_s,
        )
        assert found and any(text in line for line in self.lines), f"no {text!r} in:\n" + "".join(
            self.lines
        )

    def wait(self, deadline_s: float = 240) -> int:
        code = self.process.wait(deadline_s)
        time.sleep(0.2)  # the reader's last lines
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


@pytest.mark.sglang
def test_the_main_job_on_four_simulated_nodes(start):
    rehearsal = start("--nodes", "4", "--num-rollout", "2", "--eval.max-prompts", "50")
    assert rehearsal.wait(280) == 0, "".join(rehearsal.lines)
    run, text = rehearsal.run, "".join(rehearsal.lines)
    assert text.startswith("LOCAL REHEARSAL")
    for step in (1, 2):
        [line] = [line for line in rehearsal.lines if line.startswith(f"step {step}/2")]
        assert all(
            word in line for word in ("reward", "kl", "gap", "generate", "train", "weight_sync")
        )
    summary = json.loads(run.summary.read_text())
    assert 0.2 < summary["reward_before"] < 0.6 and summary["logprob_gap_max"] < 1e-4
    assert set(summary["phase_s"]) >= {
        "model",
        "start",
        "evaluate",
        "generate",
        "train",
        "weight_sync",
    }
    logs = {path.name for path in (run.attempts / "1" / "logs").iterdir()}
    assert {f"trainer-{r}.log" for r in range(4)} | {
        "sglang-0.log",
        "sglang-1.log",
        "driver-0.log",
    } <= logs
    assert not any("trainer-4" in name or "sglang-2" in name for name in logs)
    assert list(run.tensorboard.glob("events.out.tfevents.*"))
    rollouts = [
        json.loads(line) for line in (run.rollouts / "step_1.jsonl").read_text().splitlines()
    ]
    assert len(rollouts) == 64 * 8 and {v for r in rollouts for _, v in r["versions"]} == {1}
    exported = load_file(Path(summary["hf_export"]) / "model.safetensors")
    before = load_file(run.model / "model" / "model.safetensors")
    assert exported.keys() == before.keys()
    assert all(not exported[name].equal(before[name]) for name in exported if "proj" in name)
    AutoModelForCausalLM.from_pretrained(summary["hf_export"])


@pytest.mark.sglang
def test_trainers_and_engines_share_two_nodes(start):
    """Four Megatron ranks and two SGLang engines on the same slots, in turns, a checkpoint in between."""
    flags = ["--nodes", "2", "--colocate", "--num-rollout", "3", "--save-interval", "2"]
    rehearsal = start(*flags, "--eval.max-prompts", "20")
    assert rehearsal.wait(280) == 0, "".join(rehearsal.lines)
    run, text = rehearsal.run, "".join(rehearsal.lines)
    assert "one of the two sleeps" in text and text.count("trainer+engine") == 2
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert (
            row["time/sleep_s"] > 0
            and row["time/wake_s"] > 0
            and row["train/logprob_gap_max"] < 1e-4
        )
        assert 0.2 < row["rollout/reward_mean"] < 0.8
    summary = json.loads(run.summary.read_text())
    assert summary["reward_before"] is not None and summary["reward_after"] is not None
    assert load_file(Path(summary["hf_export"]) / "model.safetensors")


def test_one_node_falls_back_to_fsdp(start):
    """FSDP2 on the node's slots; the embedded engine leaves all of them to trainers."""
    rehearsal = start(
        "--nodes", "1", "--num-rollout", "1", "--engine", "embedded", "--eval.max-prompts", "20"
    )
    assert rehearsal.wait() == 0, "".join(rehearsal.lines)
    assert "FSDP" in "".join(rehearsal.lines)
    assert json.loads(rehearsal.run.summary.read_text())["logprob_gap_max"] < 1e-4


@pytest.mark.sglang
def test_half_a_run_each_from_its_recipe(start, tmp_path):
    """SGLang without a trainer, then two FSDP ranks without an engine, on what was recorded."""
    rollouts = start("--recipe", "rollout_only", "--num-rollout", "2", "--eval.max-prompts", "20")
    assert rollouts.wait(280) == 0, "".join(rollouts.lines)
    first = RunDir.open(tmp_path / "rollout-only")
    flags = ["--recipe", "train_only", "--num-rollout", "2", "--load-rollouts", str(first.path)]
    training = start(*flags)
    assert training.wait(280) == 0, "".join(training.lines)
    second = RunDir.open(tmp_path / "train-only")
    logs = [
        {path.name for path in (run.attempts / "1" / "logs").iterdir()} for run in (first, second)
    ]
    assert "sglang-0.log" in logs[0] and {"trainer-0.log", "trainer-1.log"} <= logs[1]
    assert not any(n.startswith("trainer") for n in logs[0])
    assert not any(n.startswith(("sglang", "engine")) for n in logs[1])
    sampled, trained = (
        [json.loads(line) for line in run.metrics.read_text().splitlines()]
        for run in (first, second)
    )
    assert [r["rollout/reward_mean"] for r in sampled] == [
        r["rollout/reward_mean"] for r in trained
    ]
    assert trained[0]["train/logprob_gap_max"] < 1e-4 < trained[1]["train/logprob_gap_max"]


@pytest.mark.matrix
@pytest.mark.sglang
def test_ranks_that_share_experts_replay_what_the_engines_chose(start, tmp_path):
    """Qwen3-MoE over EP 2, two SGLang engines, R3; random weights are rewarded for nothing but entropy."""
    model, prompts = tmp_path / "model", tmp_path / "prompts.jsonl"
    ends = dict(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    save_model(model, "qwen3_moe", vocab_size=VOCAB_SIZE, **ends)
    build_tokenizer().save_pretrained(model)
    problems, _ = digit_problems("reverse", seed=0, num_held_out=1)
    prompts.write_text("".join(json.dumps(problem._asdict()) + "\n" for problem in problems))
    flags = [
        "--hf-checkpoint",
        str(model),
        "--prompts",
        str(prompts),
        "--dtype",
        "float32",
        "--nodes",
        "2",
    ]
    flags += [
        "--tp-size",
        "1",
        "--pp-size",
        "1",
        "--ep-size",
        "2",
        "--training.routing-replay",
        "R3",
    ]
    flags += ["--num-rollout", "3", "--rollout-batch-size", "16", "--n-samples-per-prompt", "4"]
    flags += ["--max-new-tokens", "16", "--algorithm.no-filter-zero-std", "--entropy-coef", "0.05"]
    rehearsal = start(*flags, "--lr", "1e-3", "--name", "rehearsal")
    assert rehearsal.wait(280) == 0, "".join(rehearsal.lines)
    rows = [json.loads(line) for line in rehearsal.run.metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert row["train/logprob_gap_max"] < 1e-4 and row["train/grad_norm"] > 0
        assert row["train/routing_mismatch_ratio"] < 0.01  # rounding may decide a tie


def test_a_killed_trainer_rank_ends_the_run_with_its_name(start):
    flags = ["--nodes", "2", "--pp-size", "1", "--engine", "embedded", "--num-rollout", "1000"]
    rehearsal = start(*flags, "--eval.max-prompts", "8")
    rehearsal.wait_for_line("step 1/1000")
    log = rehearsal.run.attempt(1).log("trainer", 1).read_text()
    os.kill(int(re.findall(r"trainer rank 1 of .* pid (\d+)", log)[0]), signal.SIGKILL)
    assert rehearsal.wait(90) == 1
    [line] = [line for line in rehearsal.lines if "died" in line and line.startswith("failed:")]
    assert "trainer rank 1 on node 0" in line and "trainer-1.log" in line
    assert rehearsal.run.status()["phase"] == "failed"


@pytest.mark.sglang
def test_a_killed_engine_ends_the_run_with_its_name(start):
    flags = ["--nodes", "2", "--pp-size", "1", "--num-rollout", "1000"]
    rehearsal = start(*flags, "--eval.max-prompts", "8")
    rehearsal.wait_for_line("step 1/1000")
    os.kill(rehearsal.pid_of("sglang.launch_server"), signal.SIGKILL)
    assert rehearsal.wait(90) == 1
    text = "".join(rehearsal.lines)
    assert "engine-0" in text and "sglang-0.log" in text
