"""Bytes of a token and layer that a backward pass waits with, by tensor, on a CPU.

    python -m tools.bench_memory                       Qwen3-4B, both backends, both dtypes
    python -m tools.bench_memory --backend fsdp --dtype bfloat16 --recompute

It makes a train step of one micro-batch with one layer and one with two, both of the sizes of
Qwen3-4B with a small vocabulary; what the second one saves beside the first is a layer's. The
formula is that of tools/memory/activations.py.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Qwen3Config, Qwen3ForCausalLM

from nanoslime import algorithms
from nanoslime.config import GRPOConfig, ModelConfig, RunConfig, TrainingConfig
from nanoslime.models.parallel_sizes import ParallelDims
from nanoslime.models.shape import ModelShape
from nanoslime.training.backend import RankEnv
from tools.gpu_checks import make_backend, make_batch
from tools.memory.activations import Microbatch, activations_of_ranks
from tools.saved_tensors import Held, held_by_a_step

QWEN3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 1000,
    "max_position_embeddings": 1 << 15,
}
LENGTHS = [96, 160]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("megatron", "fsdp"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--tensors", action="store_true", help="list what is saved")
    arguments = parser.parse_args()
    backends = [arguments.backend] if arguments.backend else ["megatron", "fsdp"]
    dtypes = [arguments.dtype] if arguments.dtype else ["float32", "bfloat16"]
    print("| backend | dtype | bytes of a token and layer, measured | formula | ratio |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        for backend in backends:
            for dtype in dtypes:
                training = TrainingConfig(backend=backend, recompute=arguments.recompute)
                config = RunConfig(
                    model=ModelConfig(dtype=dtype), training=training, algorithm=GRPOConfig()
                )
                compare(config, Path(directory), show=arguments.tensors)


def compare(config: RunConfig, directory: Path, *, show: bool) -> None:
    measured = []
    predicted = []
    for num_layers in (1, 2):
        model_dir = directory / f"layers-{num_layers}"
        if not model_dir.exists():
            model = Qwen3ForCausalLM(Qwen3Config(**QWEN3_4B, num_hidden_layers=num_layers))
            model.save_pretrained(model_dir)
        measured.append(measure(config, model_dir, directory))
        shape = ModelShape.read(model_dir)
        alone = ParallelDims(tp=1, pp=1, cp=1, ep=1, dp=1)
        microbatch = Microbatch(sum(LENGTHS), max(LENGTHS))
        predicted.append(activations_of_ranks(config, shape, alone, microbatch)[0])
    tokens = sum(LENGTHS)
    of_layer = (measured[1].activations - measured[0].activations) / tokens
    formula = (predicted[1] - predicted[0]) / tokens
    names = f"{config.training.backend} | {config.model.dtype}"
    print(f"| {names} | {of_layer:,.0f} | {formula:,.0f} | {formula / of_layer:.3f} |", flush=True)
    if show:
        for (dtype, shape_of_one, maker), number in (
            measured[1].shapes - measured[0].shapes
        ).items():
            print(f"  {number} x {dtype} {list(shape_of_one)} from {maker}")


def measure(config: RunConfig, model_dir: Path, directory: Path) -> Held:
    rendezvous = tempfile.mktemp(dir=directory)
    env = RankEnv(0, 1, 0, "cpu", f"file://{rendezvous}")
    backend = make_backend(config, model_dir, env)
    batch = make_batch(LENGTHS, QWEN3_4B["vocab_size"], sequences=len(LENGTHS))
    try:
        return held_by_a_step(backend, batch, algorithms.make(config.algorithm))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
