"""CPU seconds of generating and training in a GRPO step, beside TRL's GRPOTrainer.

    OMP_NUM_THREADS=1 python tools/bench_peer.py --prompts gsm8k/train.jsonl
        [--trl-python TRL_ENVIRONMENT/bin/python] [--ways fsdp+embedded ...] [--steps 4] [--small]

A Qwen3 of 11.5 million parameters, 8 prompts x 16 samples x 64 tokens, one optimizer step
a rollout; --small tries the same code on tiny sizes. Each way is a process of its own; its
first step is left out, and the table shows medians. Seconds are those of the processors,
SGLang's processes included; generating ends with the rewards, and the weight sync is in
neither column. TRL's environment is the project's with, --no-deps, trl==1.16.0 accelerate
datasets dill multiprocess pandas and what these import.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from dataclasses import dataclass
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

WAYS = ("trl", "fsdp+embedded", "fsdp+sglang", "megatron+embedded", "megatron+sglang")
HEADER = """\
| | generate s | of TRL's | train s | of TRL's | each step's, generate | train |
|---|---|---|---|---|---|---|"""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The work: a model, and how much it generates in a step."""

    vocab_size: int
    num_layers: int
    num_prompts: int
    samples_per_prompt: int
    num_tokens: int  # of a response


FULL = Sizes(vocab_size=7168, num_layers=8, num_prompts=8, samples_per_prompt=16, num_tokens=64)
SMALL = Sizes(vocab_size=512, num_layers=1, num_prompts=2, samples_per_prompt=2, num_tokens=4)


def make_work(work: Path, prompts: Path, sizes: Sizes) -> None:
    """Writes model/ with its tokenizer, and prompts.jsonl with 512 prompts of some 30 tokens."""
    lines = prompts.read_text().splitlines()
    rows = [{"prompt": json.loads(line)["question"][:120], "label": ""} for line in lines[:512]]
    work.joinpath("prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(lines, sizes.vocab_size, special_tokens=["<eos>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<eos>", padding_side="left"
    )
    tokenizer.save_pretrained(work / "model")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=sizes.vocab_size,
        eos_token_id=0,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
    )
    Qwen3ForCausalLM(config).save_pretrained(work / "model")


def count_digits(text: str, label: Any = "", metadata: Any = None) -> float:
    """The reward of both: how many digits there are."""
    return float(sum(character.isdigit() for character in text))


class Stopwatch:
    """A clock of train(): CPU seconds of its phases, of this process and its descendants."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {"generate": [], "train": []}
        self.step = 0
        # No checkpoint is due because of it.
        self.in_phase_s = 0.0
        self._phase = ""
        self._start = 0.0

    def __call__(self, phase: str) -> None:
        this = psutil.Process()
        now = sum(_cpu_seconds(process) for process in [this, *this.children(recursive=True)])
        if self._phase in self.seconds:
            self.seconds[self._phase].append(now - self._start)
        self._phase = phase
        self._start = now


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:  # it has ended since it was listed
        return 0.0
    return times.user + times.system


def run_ours(work: Path, way: str, sizes: Sizes, steps: int, stopwatch: Stopwatch) -> None:
    backend, engine = way.split("+")
    sampling = {
        "rollout_batch_size": sizes.num_prompts,
        "n_samples_per_prompt": sizes.samples_per_prompt,
        "max_new_tokens": sizes.num_tokens,
    }
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


def run_trl(work: Path, sizes: Sizes, steps: int, stopwatch: Stopwatch) -> None:
    rows = [json.loads(line) for line in work.joinpath("prompts.jsonl").read_text().splitlines()]
    trainer = resolve("trl:GRPOTrainer", {}, "--trl-python")(
        model=str(work / "model"),
        reward_funcs=lambda completions, **columns: [count_digits(text) for text in completions],
        train_dataset=resolve("datasets:Dataset", {}, "--trl-python").from_list(rows),
        args=resolve("trl:GRPOConfig", {}, "--trl-python")(
            output_dir=str(work / "trl"),
            max_steps=steps,
            per_device_train_batch_size=sizes.num_prompts * sizes.samples_per_prompt,
            num_generations=sizes.samples_per_prompt,
            max_completion_length=sizes.num_tokens,
            learning_rate=1e-4,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            save_strategy="no",  # a save would count as the last step's training
            report_to=[],
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


def measure(options: Namespace) -> None:
    """Prints the CPU seconds of one way: the work of a process that `compare` starts."""
    stopwatch = Stopwatch()
    sizes = SMALL if options.small else FULL
    [way] = options.ways
    if way == "trl":
        run_trl(options.work, sizes, options.steps, stopwatch)
    else:
        run_ours(options.work, way, sizes, options.steps, stopwatch)
    print(json.dumps(stopwatch.seconds))


def compare(options: Namespace) -> None:
    """Prints the table, a row as soon as it is measured; TRL comes first."""
    print(HEADER, flush=True)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    trl: list[float] = []
    with tempfile.TemporaryDirectory() as work:
        make_work(Path(work), options.prompts, SMALL if options.small else FULL)
        for way in sorted(options.ways, key=WAYS.index):
            python = options.trl_python if way == "trl" else sys.executable
            command = [python, __file__, "--work", work, "--ways", way]
            command += ["--steps", str(options.steps)]
            if options.small:
                command.append("--small")
            output = subprocess.check_output(command, text=True, env=environment)
            phases = json.loads(output.splitlines()[-1])
            later = [phases["generate"][1:], phases["train"][1:]]
            medians = [statistics.median(seconds) for seconds in later]
            if way == "trl":
                trl = medians
            cells = []
            for i, seconds in enumerate(medians):
                ratio = f"{seconds / trl[i]:.2f}" if trl else ""
                cells += [f"{seconds:.2f}", ratio]
            cells += [" ".join(f"{s:.2f}" for s in seconds) for seconds in later]
            print(f"| {way} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, help="JSON lines with a question each")
    parser.add_argument("--trl-python", default=sys.executable)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the code")
    parser.add_argument("--work", type=Path, help="where a process finds what to measure")
    options = parser.parse_args()
    if options.work:
        measure(options)
        return
    if options.prompts is None:
        parser.error("--prompts names no file; give the JSON lines of GSM8K, or others like them")
    if options.steps < 2:
        parser.error(f"--steps {options.steps} leaves no step after the first; give 2 or more")
    compare(options)


if __name__ == "__main__":
    main()
