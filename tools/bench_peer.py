"""CPU seconds of generating and training in a GRPO step, beside TRL's GRPOTrainer.

    OMP_NUM_THREADS=1 python tools/bench_peer.py --prompts gsm8k/train.jsonl
        [--trl-python TRL_ENVIRONMENT/bin/python] [--ways fsdp+embedded ...] [--steps 4]

A Qwen3 of 11.5 million parameters, 8 prompts x 16 samples x 64 tokens, one optimizer step
a rollout. Each way is a process of its own; its first step is left out, and the table
shows medians. Seconds are those of the processors, SGLang's processes included; generating
ends with the rewards. TRL's environment is the project's with, --no-deps, trl==1.16.0
accelerate datasets dill multiprocess pandas and what these import.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import psutil
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from nanoslime.orchestration.launch import parse
from nanoslime.plugins import resolve
from nanoslime.tracking import make_tracker
from nanoslime.train import train

VOCAB_SIZE = 7168
WAYS = ("trl", "fsdp+embedded", "fsdp+sglang", "megatron+embedded", "megatron+sglang")


def make_work(work: Path, prompts: Path) -> None:
    """Writes model/ with its tokenizer, and prompts.jsonl with 512 prompts of some 30 tokens."""
    lines = prompts.read_text().splitlines()
    rows = [{"prompt": json.loads(line)["question"][:120], "label": ""} for line in lines[:512]]
    work.joinpath("prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(lines, VOCAB_SIZE, special_tokens=["<eos>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<eos>", padding_side="left"
    )
    tokenizer.save_pretrained(work / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "head_dim": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    config = Qwen3Config(vocab_size=VOCAB_SIZE, eos_token_id=0, **sizes, **heads)
    Qwen3ForCausalLM(config).save_pretrained(work / "model")


def count_digits(text: str, label: Any = "", metadata: Any = None) -> float:
    """The reward of both: how many digits there are."""
    return float(sum(character.isdigit() for character in text))


class Stopwatch:
    """A clock of train(): CPU seconds of its phases, of this process and its descendants."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {"generate": [], "train": []}
        self.step = 0
        self._phase = ""
        self._start = 0.0

    def __call__(self, phase: str) -> None:
        this = psutil.Process()
        processes = [this, *this.children(recursive=True)]
        now = sum(sum(process.cpu_times()[:2]) for process in processes)
        if self._phase in self.seconds:
            self.seconds[self._phase].append(now - self._start)
        self._phase = phase
        self._start = now


def run_ours(work: Path, way: str, steps: int, stopwatch: Stopwatch) -> None:
    backend, engine = way.split("+")
    sampling = {"rollout_batch_size": 8, "n_samples_per_prompt": 16, "max_new_tokens": 64}
    recipe = {
        "model": {"hf_checkpoint": str(work / "model"), "dtype": "float32"},
        "data": {"prompts": str(work / "prompts.jsonl"), "reward": "tools.bench_peer:count_digits"},
        "rollout": {"num_rollout": steps, "engine": engine, **sampling},
        "algorithm": {"old_logprobs": "current", "filter_zero_std": False},
        "training": {"backend": backend, "lr": 1e-4},
        "checkpoint": {"export_hf": False},
        "cluster": {"run_root": str(work / "runs")},
    }
    path = work / f"{way}.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    launch = parse([str(path)])
    with launch.open(stopwatch) as session:
        with make_tracker(session.config, launch.attempt.run, 0) as tracker:
            train(session, tracker, stopwatch, 0)


def run_trl(work: Path, steps: int, stopwatch: Stopwatch) -> None:
    rows = [json.loads(line) for line in work.joinpath("prompts.jsonl").read_text().splitlines()]
    options = {"per_device_train_batch_size": 8 * 16, "gradient_checkpointing": False}
    options |= {"num_generations": 16, "max_completion_length": 64, "learning_rate": 1e-4}
    trainer = resolve("trl:GRPOTrainer", {}, "--trl-python")(
        model=str(work / "model"),
        reward_funcs=lambda completions, **columns: [count_digits(text) for text in completions],
        train_dataset=resolve("datasets:Dataset", {}, "--trl-python").from_list(rows),
        args=resolve("trl:GRPOConfig", {}, "--trl-python")(
            output_dir=str(work / "trl"),
            max_steps=steps,
            use_cpu=True,
            bf16=False,
            report_to=[],
            **options,
        ),
    )
    generate = trainer._generate_and_score_completions

    def timed_generate(inputs: Any) -> Any:
        stopwatch("generate")
        outputs = generate(inputs)
        stopwatch("train")
        return outputs

    trainer._generate_and_score_completions = timed_generate
    trainer.train()
    stopwatch("end")


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--trl-python", default=sys.executable)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--steps", default="4")
    parser.add_argument("--work", type=Path, help="where a process finds what to measure")
    options = parser.parse_args()
    if options.work:
        stopwatch = Stopwatch()
        [way] = options.ways
        if way == "trl":
            run_trl(options.work, int(options.steps), stopwatch)
        else:
            run_ours(options.work, way, int(options.steps), stopwatch)
        print(json.dumps(stopwatch.seconds))
        return
    print("| | generate s | train s | each step's, generate | train |\n|---|---|---|---|---|")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with tempfile.TemporaryDirectory() as work:
        make_work(Path(work), options.prompts)
        for way in options.ways:
            python = options.trl_python if way == "trl" else sys.executable
            command = [python, __file__, "--work", work, "--ways", way, "--steps", options.steps]
            output = subprocess.check_output(command, text=True, env=environment)
            phases = json.loads(output.splitlines()[-1])
            later = [phases["generate"][1:], phases["train"][1:]]
            cells = [f"{statistics.median(seconds):.2f}" for seconds in later]
            cells += [" ".join(f"{s:.2f}" for s in seconds) for seconds in later]
            print(f"| {way} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
