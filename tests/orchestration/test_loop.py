"""The loop in one process with the real backend and the embedded engine: it learns,
stops, resumes, refuses.
"""

import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanoslime import rehearsal, train
from nanoslime.batch import TrainBatch
from nanoslime.config.model import RehearsalConfig
from nanoslime.models.rules import tensors
from nanoslime.models.shape import ModelShape
from nanoslime.orchestration.groups import TrainGroup
from nanoslime.orchestration.launch import MOCK_RECIPE, Launch, parse
from nanoslime.orchestration.rollout_manager import RolloutManager
from nanoslime.orchestration.worker import TrainWorker
from nanoslime.rollout.engines.embedded_model import EmbeddedEngine
from nanoslime.run_dir import DONE, FAILED, STOPPED, RunDir
from nanoslime.training.backend import TrainBackend
from nanoslime.training.fsdp import FSDPBackend
from tests import process_table
from tests.models.hf import add_mtp, save_model
from tests.orchestration.wired import same_tensors
from tests.serving import save_tied_with_head

SMALL = "--rollout-batch-size 4 --n-samples-per-prompt 4 --no-use-tensorboard --eval.max-prompts 20"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> rehearsal.RehearsalFiles:
    directory = tmp_path_factory.mktemp("files") / "model"
    return rehearsal.make(directory, RehearsalConfig(num_held_out=200))


def run_dir(root: Path, name: str, model: rehearsal.RehearsalFiles, more: str = "") -> list[str]:
    """Flags of a mock run whose model is there already, so that no test waits for a warm
    start.
    """
    flags = ["--mock", *SMALL.split(), "--run-root", root, "--name", name]
    flags += ["--rehearsal.enabled=false", "--hf-checkpoint", model.model]
    flags += ["--prompts", model.train, "--eval-prompts", model.held_out, *more.split()]
    return [str(flag) for flag in flags]


def rows(run: RunDir) -> list[dict]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def losses(run: RunDir) -> list[tuple[float, float, float]]:
    return [(r["rollout/reward_mean"], r["train/loss"], r["train/grad_norm"]) for r in rows(run)]


def test_a_run_ends_with_summary_checkpoint_and_export(tmp_path, model):
    assert train.main([*run_dir(tmp_path, "whole", model), "--num-rollout", "2"]) == DONE
    run = RunDir.open(tmp_path / "whole")
    summary = json.loads(run.summary.read_text())
    assert summary["steps"] == 2 and 0 < summary["reward_before"] < 1
    assert summary["logprob_gap_max"] < 1e-4
    assert Path(summary["checkpoint"]).is_dir()
    assert (Path(summary["hf_export"]) / "model.safetensors").is_file()
    assert run.status()["phase"] == "done"
    assert len((run.rollouts / "step_1-0.jsonl").read_text().splitlines()) == 16


def test_an_engine_with_other_weights_ends_the_run_in_the_same_step(tmp_path, model, monkeypatch):
    """A layer of it is scaled once the run is at version 2."""
    load = EmbeddedEngine.load_weights

    def scaling(engine, named, version):
        load(engine, named, version)
        if version == 2:
            with torch.no_grad():
                engine._model.model.layers[0].mlp.down_proj.weight.mul_(1.2)

    monkeypatch.setattr(EmbeddedEngine, "load_weights", scaling)
    assert train.main(run_dir(tmp_path, "scaled", model, "--num-rollout 4")) == FAILED
    run = RunDir.open(tmp_path / "scaled")
    [row] = rows(run)
    assert row["step"] == 0 and 0 <= row["weight_sync/logprob_gap_max"] < 1e-4
    assert run.status()["step"] == 1
    cause = "engine embedded gives .* with what it calls version 2 .*max_logprob_gap is 0.01"
    assert re.search(cause, run.status()["error"])


@pytest.mark.parametrize("backend", ["fsdp", pytest.param("megatron", marks=pytest.mark.megatron)])
def test_a_stopped_run_resumes_exactly(tmp_path, model, backend, monkeypatch):
    """Stopped in the second or after two of four rollouts and resumed: rewards, losses and
    gradient norms of an uninterrupted run.
    """
    more = f"--backend {backend} --num-rollout 4 --use-kl-loss --kl-loss-coef 0.01"
    flags = run_dir(tmp_path, "straight", model, more)
    assert train.main(flags) == DONE
    flags[flags.index("straight")] = "stopped"
    launch = parse(flags)
    stop_after(2, launch, monkeypatch)
    assert train.run(launch) == STOPPED
    monkeypatch.undo()
    stopped = RunDir.open(tmp_path / "stopped")
    assert stopped.status()["phase"] == "stopped"
    assert stopped.status()["step"] in (1, 2)
    assert train.main(["--resume", str(stopped.path)]) == DONE
    assert losses(stopped) == losses(RunDir.open(tmp_path / "straight"))
    assert [r["step"] for r in rows(stopped)] == [0, 1, 2, 3]
    assert json.loads(stopped.summary.read_text())["reward_before"] is not None


@pytest.mark.parametrize("backend", ["fsdp", pytest.param("megatron", marks=pytest.mark.megatron)])
def test_a_colocated_run_is_the_same_run(tmp_path, model, backend, monkeypatch):
    """Trainer and engine take turns, once a step: a checkpoint costs no further sync, and
    every number is that of a run without sleep.
    """
    more = f"--backend {backend} --num-rollout 2 --save-interval 1"
    flags = run_dir(tmp_path, "awake", model, more)
    assert train.main(flags) == DONE
    flags[flags.index("awake")] = "turns"
    calls = record_turns(monkeypatch)
    assert train.main([*flags, "--colocate"]) == DONE
    awake = RunDir.open(tmp_path / "awake")
    turns = RunDir.open(tmp_path / "turns")
    assert losses(turns) == losses(awake) and turns.evals.read_text() == awake.evals.read_text()
    assert all(row["time/sleep_s"] > 0 and row["time/wake_s"] > 0 for row in rows(turns))
    to_trainer = ["release", "wake"]
    to_engine = ["resume weights", "sleep", "resume cache"]
    step = [*to_trainer, "save", *to_engine]
    assert calls == ["release", *to_engine, *step, *step, *to_trainer], "the export is last"


def test_a_stop_after_the_sync_of_a_colocated_run_is_saved_without_another_sync(
    tmp_path, model, monkeypatch
):
    """The run ends, so that nobody needs the engine's weights; a resumed run is the
    uninterrupted one.
    """
    more = "--backend fsdp --num-rollout 3 --eval-interval 1 --colocate"
    flags = run_dir(tmp_path, "straight", model, more)
    assert train.main(flags) == DONE
    flags[flags.index("straight")] = "stopped"
    launch = parse(flags)
    evaluate = RolloutManager.evaluate

    def stopping(self, step):
        if step == 1:
            launch.attempt.request_stop("a test asked")
        return evaluate(self, step)

    monkeypatch.setattr(RolloutManager, "evaluate", stopping)
    calls = record_turns(monkeypatch)
    assert train.run(launch) == STOPPED
    assert calls.count("resume weights") == 3 and calls[-3:] == ["release", "wake", "save"]
    monkeypatch.undo()
    stopped = RunDir.open(tmp_path / "stopped")
    assert train.main(["--resume", str(stopped.path)]) == DONE
    assert losses(stopped) == losses(RunDir.open(tmp_path / "straight"))


def test_a_driver_that_a_newer_attempt_has_followed_ends_and_writes_nothing(
    tmp_path, model, monkeypatch, caplog
):
    """As when its node is lost to SLURM, which starts the job anew, while it lives on."""
    more = "--backend fsdp --num-rollout 3 --save-interval 1"
    launch = parse(run_dir(tmp_path, "run", model, more))
    train_group = TrainGroup.train

    def followed(self, groups, version):
        if version == 1:
            self.run.new_attempt()
        return train_group(self, groups, version)

    monkeypatch.setattr(TrainGroup, "train", followed)
    assert train.run(launch) == FAILED
    run = launch.attempt.run
    assert "attempt 2 of " in caplog.messages[-1] and "so attempt 1 ends" in caplog.messages[-1]
    assert [path.name for path in run.checkpoints.iterdir()] == ["step_1"]
    assert [row["step"] for row in rows(run)] == [0]
    assert run.status()["phase"] != "failed"


def record_turns(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the engine and the trainer are told about memory, and saves, in order."""
    calls = []

    def record(cls, method, name):
        original = getattr(cls, method)

        def call(self, *args):
            parts = [str(arg) for arg in args if isinstance(arg, str)]
            calls.append(" ".join([name, *parts]))
            return original(self, *args)

        monkeypatch.setattr(cls, method, call)

    record(EmbeddedEngine, "release_memory", "release")
    record(EmbeddedEngine, "resume_memory", "resume")
    record(TrainBackend, "sleep", "sleep")
    record(TrainBackend, "wake", "wake")
    record(TrainWorker, "save", "save")
    return calls


def stop_after(rollouts: int, launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asks for a stop, as an agent does on a signal, while that rollout is generated."""
    generate = RolloutManager.generate

    def stopping(self, step):
        if step == rollouts - 1:
            launch.attempt.request_stop("a test asked")
        return generate(self, step)

    monkeypatch.setattr(RolloutManager, "generate", stopping)


def test_old_logprobs_are_taken_before_the_first_step(tmp_path, model):
    """Two optimizer steps per rollout: the first is on-policy, the second is not, unless
    old logprobs follow the steps.
    """
    more = "--num-rollout 1 --num-steps-per-rollout 2 --lr 1e-2 --training.lr-warmup-steps 0"
    flags = run_dir(tmp_path, "two", model, f"{more} --algorithm.filter-zero-std=false")
    assert train.main(flags) == DONE
    [row] = rows(RunDir.open(tmp_path / "two"))
    # The second step's; it is 0 in both where old logprobs are taken too late.
    assert row["train/ppo_kl_abs_max"] > 1e-2


def test_all_groups_filtered_leaves_the_weights_and_goes_on(tmp_path, model):
    reward = "tests.orchestration.rewards:always_one"
    flags = run_dir(tmp_path, "flat", model, f"--num-rollout 2 --reward {reward}")
    assert train.main(flags) == DONE
    run = RunDir.open(tmp_path / "flat")
    for row in rows(run):
        assert row["rollout/dropped_group_zero_std"] == 4 and "train/loss" not in row
    before = load_file(model.model / "model.safetensors")
    after = load_file(run.hf(2) / "model.safetensors")
    assert same_tensors(after, before)


def test_an_algorithm_of_the_users_own_trains_with_its_own_knobs(tmp_path, model):
    """Scaled by 1 it is GRPO itself; scaled by 2 its first gradient is twice as long."""
    name = "tests.orchestration.custom_algorithm:Scaled"
    found = {}
    for run, algorithm in (
        ("grpo", "{name: grpo}"),
        ("once", f"{{name: '{name}', options: {{scale: 1.0}}}}"),
        ("twice", f"{{name: '{name}', options: {{scale: 2.0}}}}"),
    ):
        recipe = tmp_path / f"{run}.yaml"
        recipe.write_text(f"{MOCK_RECIPE.read_text()}\nalgorithm: {algorithm}\n")
        flags = run_dir(tmp_path, run, model, "--num-rollout 2")
        flags.remove("--mock")
        assert train.main([str(recipe), *flags]) == DONE
        found[run] = losses(RunDir.open(tmp_path / run))
        assert len(found[run]) == 2
    assert found["once"] == found["grpo"]
    assert found["twice"][0][2] == pytest.approx(2 * found["grpo"][0][2], rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--algorithm", "tests.orchestration.rewards:always_one"], "is no algorithm; name a sub"),
        (["--algorithm", "tests.no_such:It"], "cannot load tests.no_such:It: No module named"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--hf-checkpoint", "nowhere"], "model.hf_checkpoint='nowhere'"),
        (["--reward", "no_such"], "data.reward='no_such' is unknown; choose one of exact_match"),
        (["--reward", "tests.orchestration.rewards:none"], "cannot load tests.orchestration.rew"),
        (["--reward", "tests.orchestration.rewards:__name__"], "name a function of a response"),
        (["--tp-size", "3"], "tp_size"),
        (["--cluster.gpus-per-node", "1", "--engine", "sglang"], "no GPU beside the trainer"),
        (["--lrr", "1"], "--lr"),
    ],
)
def test_bad_input_ends_in_one_line(tmp_path, model, caplog, flags, message):
    assert train.main([*run_dir(tmp_path, "bad", model, "--num-rollout 1"), *flags]) == FAILED
    [error] = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    assert message in error and "Traceback" not in caplog.text


TORCHRUN = {
    "cwd": Path(train.__file__).parents[1],
    "env": os.environ | {"OMP_NUM_THREADS": "1"},
}


def torchrun(flags: list[str], module: str = "nanoslime.train", num_ranks: int = 2) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks), "--standalone"]
    return [sys.executable, *launcher, "-m", module, *flags]


@pytest.mark.parametrize(
    "backend",
    [
        "fsdp",
        pytest.param("megatron --tp-size 2", marks=[pytest.mark.megatron, pytest.mark.matrix]),
    ],
)
def test_two_torchrun_ranks_equal_one(tmp_path, model, backend, no_leftovers):
    """Rank 0 owns the engine and drives the other rank; the losses are those of a single
    process.
    """
    flags = run_dir(tmp_path, "one", model, "--num-rollout 2")
    assert train.main(flags) == DONE
    flags[flags.index("one")] = "two"
    command = torchrun([*flags, "--backend", *backend.split()])
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, **TORCHRUN)
    assert done.returncode == 0, done.stderr[-2000:]
    one = losses(RunDir.open(tmp_path / "one"))
    two = losses(RunDir.open(tmp_path / "two"))
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-7)


def test_a_torchrun_rank_that_dies_ends_the_run_with_its_name(tmp_path, model, no_leftovers):
    """It dies while rank 0 samples or trains; torchrun then ends rank 0, which first says
    why.
    """
    flags = run_dir(tmp_path, "dies", model, "--num-rollout 1000 --backend fsdp")
    process = subprocess.Popen(
        torchrun(flags), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **TORCHRUN
    )
    try:
        run_path = tmp_path / "dies"
        assert process_table.wait_for(lambda: (run_path / "metrics.jsonl").exists(), 120)
        family = process_table.descendants(process.pid, process_table.all_processes())
        [victim] = [p.pid for p in family if p.has_env("RANK", "1")]
        os.kill(victim, signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    status = RunDir.open(run_path).status()
    assert process.returncode != 0 and status["phase"] == "failed", output[-3000:]
    assert status["error"].startswith("trainer rank 1 died")


def test_a_torchrun_rank_that_fails_ends_the_run_with_its_name(tmp_path, model, no_leftovers):
    """Torchrun then ends the rank that is still busy, which is not the one that failed."""
    flags = run_dir(tmp_path, "fails", model, "--num-rollout 1000 --backend fsdp")
    command = torchrun(flags, module="tests.orchestration.failing_rank", num_ranks=3)
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, **TORCHRUN)
    status = RunDir.open(tmp_path / "fails").status()
    assert done.returncode != 0 and status["phase"] == "failed", done.stderr[-3000:]
    told = "trainer rank 1 failed to train: RuntimeError: no memory in the third step"
    assert status["error"].startswith(told)
    log = RunDir.open(tmp_path / "fails").attempt(1).log("trainer", 1).read_text()
    assert "Traceback (most recent call last)" in log and "in failing\n" in log


@pytest.mark.matrix
def test_a_late_rank_is_told_by_the_one_that_waits_in_a_collective(tmp_path, model, no_leftovers):
    more = "--num-rollout 1000 --backend fsdp --training.collective-deadline-s 6"
    flags = run_dir(tmp_path, "late", model, more)
    command = torchrun(flags, module="tests.orchestration.failing_rank", num_ranks=3)
    environment = TORCHRUN["env"] | {"LATE_RANK": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, **TORCHRUN | {"env": environment}
    )
    status = RunDir.open(tmp_path / "late").status()
    assert done.returncode != 0 and status["phase"] == "failed", done.stderr[-3000:]
    assert status["error"].startswith(
        "trainer rank 0 failed to train: another rank was not there for a collective within "
        "training.collective_deadline_s=6 seconds"
    )


def test_the_gsm8k_recipe_trains_on_its_real_file(tmp_path, tiny_model):
    """Chat template, its keys, the maths reward; on a small file of our own where there
    is no other.
    """
    root = Path(train.__file__).parents[1]
    prompts = root.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
    if not prompts.exists():
        prompts = tmp_path / "train.jsonl"
        problems = [
            {"question": f"{i} + {i}?", "answer": f"Twice.\n#### {2 * i}"} for i in range(9)
        ]
        prompts.write_text("\n".join(json.dumps(row) for row in problems))
    flags = [str(root / "jobs" / "recipes" / "gsm8k.yaml"), "--run-root", str(tmp_path)]
    flags += ["--hf-checkpoint", str(tiny_model), "--prompts", str(prompts)]
    flags += "--num-rollout 1 --rollout-batch-size 4 --n-samples-per-prompt 2".split()
    flags += "--max-new-tokens 8 --dtype float32 --engine embedded --backend fsdp".split()
    flags += "--data.max-prompt-tokens 2048 --algorithm.filter-zero-std=false".split()
    assert train.main([*flags, "--no-use-tensorboard"]) == DONE
    run = RunDir.open(tmp_path / "gsm8k")
    [row] = rows(run)
    assert row["rollout/num_samples"] == 8 and row["train/logprob_gap_max"] < 1e-4
    sample = json.loads((run.rollouts / "step_0-0.jsonl").read_text().splitlines()[0])
    assert "####" in sample["label"] and sample["reward"] in (0.0, 1.0)


def test_a_skipped_step_is_counted_and_its_batch_kept(tmp_path, model, monkeypatch):
    first_norms = [math.inf]
    measured = FSDPBackend._grad_norm

    def norm(backend: FSDPBackend) -> float:
        return first_norms.pop() if first_norms else measured(backend)

    monkeypatch.setattr(FSDPBackend, "_grad_norm", norm)
    assert train.main(run_dir(tmp_path, "skips", model, "--num-rollout 2 --backend fsdp")) == DONE
    run = RunDir.open(tmp_path / "skips")
    skipped = [(row["train/skipped"], row["train/num_skipped"]) for row in rows(run)]
    assert skipped == [(1.0, 1.0), (0.0, 1.0)]
    [file] = run.skipped.rglob("*.pt")
    assert file == run.skipped / "step_0" / "rank_0.pt" and TrainBatch.load(file).num_tokens > 0


@pytest.mark.megatron
@pytest.mark.parametrize("replay", ["R2", "R3"])
def test_a_model_with_experts_trains_with_its_routing_replayed(tmp_path, model, replay):
    """R3: the experts go from the engine through samples and batches into the step; R2:
    from pass to pass.
    """
    tokenizer = AutoTokenizer.from_pretrained(model.model)
    moe = save_model(
        tmp_path / "model", "qwen3_moe", vocab_size=len(tokenizer), max_position_embeddings=4096
    )
    tokenizer.save_pretrained(moe)
    more = "--backend megatron --num-rollout 2 --lr 1e-2 --num-steps-per-rollout 2"
    flags = run_dir(tmp_path, "moe", replace(model, model=moe), more)
    flags += ["--data.reward", "tests.orchestration.rewards:by_text_where_labelled"]
    assert train.main([*flags, "--training.routing-replay", replay]) == DONE
    for row in rows(RunDir.open(tmp_path / "moe")):
        assert row["train/logprob_gap_max"] < 1e-4 and row["train/grad_norm"] > 0
        # The second step's weights choose otherwise for some tokens; without a replay the
        # ratio is not in the row, and with the wrong experts it is near 1.
        assert 0.0 < row["train/routing_mismatch_ratio"] < 0.5


@pytest.mark.parametrize("transport", ["in_process", "disk"])
@pytest.mark.parametrize("backend", ["fsdp", pytest.param("megatron", marks=pytest.mark.megatron)])
def test_a_tied_model_trains_whose_files_hold_the_output_layer(tmp_path, model, backend, transport):
    """As those of Qwen3-0.6B do. The export has it once, and transformers loads it tied."""
    tied = save_tied_with_head(tmp_path / "model", seed=0)
    AutoTokenizer.from_pretrained(model.model).save_pretrained(tied)
    more = f"--backend {backend} --num-rollout 2 --weight-sync.transport {transport}"
    flags = run_dir(tmp_path, "tied", replace(model, model=tied), more)
    reward = ["--data.reward", "tests.orchestration.rewards:by_text_where_labelled"]
    assert train.main([*flags, *reward]) == DONE
    run = RunDir.open(tmp_path / "tied")
    assert all(row["train/logprob_gap_max"] < 1e-4 for row in rows(run))
    export = run.hf(2)
    assert "lm_head.weight" not in load_file(export / "model.safetensors")
    exported = AutoModelForCausalLM.from_pretrained(export)
    assert exported.lm_head.weight is exported.model.embed_tokens.weight
    before = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    assert not torch.equal(exported.lm_head.weight, before)


@pytest.mark.megatron
@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_a_model_trains_whose_files_hold_multi_token_prediction(tmp_path, model, family):
    tokenizer = AutoTokenizer.from_pretrained(model.model)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 4096}
    if family == "deepseek_v3":
        sizes["num_key_value_heads"] = 4
    moe = add_mtp(save_model(tmp_path / "model", family, **sizes))
    tokenizer.save_pretrained(moe)
    more = "--backend megatron --num-rollout 1 --lr 1e-2"
    flags = run_dir(tmp_path, "mtp", replace(model, model=moe), more)
    flags += ["--data.reward", "tests.orchestration.rewards:by_text_where_labelled"]
    assert train.main(flags) == DONE
    run = RunDir.open(tmp_path / "mtp")
    assert all(row["train/logprob_gap_max"] < 1e-4 for row in rows(run))
    exported = load_file(run.hf(1) / "model.safetensors")
    assert exported.keys() == tensors(ModelShape.read(moe)).keys()
    assert AutoModelForCausalLM.from_pretrained(run.hf(1)).config.num_nextn_predict_layers == 1


def test_several_sources_give_their_shares_also_of_a_run_that_is_resumed(tmp_path, model):
    lines = model.train.read_text().splitlines()
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join(["{", *lines[:3]]))
    own = {"prompts": str(broken), "name": "b", "weight": 3}
    own["reward"] = "tests.orchestration.rewards:always_one"
    sources = ["--data.sources", json.dumps({"prompts": str(model.train), "name": "a"})]
    sources += [json.dumps(own), "--data.broken", "skip", "--save-interval", "1"]
    flags = run_dir(tmp_path, "whole", model)
    at = flags.index("--prompts")
    flags[at : at + 2] = sources
    assert train.main([*flags, "--num-rollout", "2"]) == DONE
    whole = RunDir.open(tmp_path / "whole")
    for row in rows(whole):
        assert (row["rollout/a/num_samples"], row["rollout/b/num_samples"]) == (4, 12)
        assert row["rollout/b/reward_mean"] == 1.0 > row["rollout/a/reward_mean"]
        mean = (row["rollout/a/reward_mean"] + 3 * row["rollout/b/reward_mean"]) / 4
        assert row["rollout/reward_mean"] == pytest.approx(mean)

    flags[flags.index("whole")] = "halves"
    assert train.main([*flags, "--num-rollout", "1"]) == DONE
    halves = RunDir.open(tmp_path / "halves")
    assert train.main(["--resume", str(halves.path), "--num-rollout", "2"]) == DONE
    assert [of_rollout(row) for row in rows(halves)] == [of_rollout(row) for row in rows(whole)]


def test_a_weighted_sum_of_rewards_trains_and_an_evaluation_has_its_own(tmp_path, model):
    parts = {"exact_match": 1.0, "tests.orchestration.rewards:by_length": 0.5}
    own = {"prompts": str(model.held_out), "name": "own", "max_prompts": 4}
    own["reward"] = "tests.orchestration.rewards:always_one"
    flags = run_dir(tmp_path, "sum", model, "--num-rollout 1")
    flags += ["--data.rewards", json.dumps(parts), "--eval.sets", json.dumps(own)]
    assert train.main(flags) == DONE
    run = RunDir.open(tmp_path / "sum")
    for line in (run.rollouts / "step_0-0.jsonl").read_text().splitlines():
        sample = json.loads(line)
        expected = {"exact_match": float(sample["text"].strip() == sample["label"])}
        expected["tests.orchestration.rewards:by_length"] = float(len(sample["text"]))
        assert sample["reward_parts"].keys() == expected.keys()
        assert sample["reward"] == sum(parts[n] * v for n, v in sample["reward_parts"].items())
        assert sample["reward_parts"] == expected, sample
    [row] = rows(run)
    means = [row[f"rollout/reward_{name}_mean"] for name in parts]
    assert means[1] > 0 and row["train/grad_norm"] > 0
    assert row["rollout/reward_mean"] == pytest.approx(means[0] + 0.5 * means[1])
    evals = [json.loads(line) for line in run.evals.read_text().splitlines()]
    assert [one["set"] for one in evals] == ["held_out", "own"] * 2
    # The first set has the sum, which is above 1 only with the lengths in it.
    assert evals[0]["reward"] > 1.0 and [one["reward"] for one in evals[1::2]] == [1.0, 1.0]


def of_rollout(row: dict) -> dict:
    return {name: value for name, value in row.items() if name.startswith("rollout/")}
