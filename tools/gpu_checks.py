"""The sections of tools/check_gpu.py. Each runs in a process of its own, on one device.

A section is a function of `Sizes` and a directory that all sections share. It yields its
figures as it measures them; one with a limit passes or fails.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Literal

import torch
import torch.multiprocessing as mp
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from nanoslime import algorithms, train
from nanoslime.batch import StepMetrics, TrainBatch
from nanoslime.config import GRPOConfig, ModelConfig, RolloutConfig, RunConfig, TrainingConfig
from nanoslime.models.parallel_sizes import ParallelDims
from nanoslime.models.shape import ModelShape
from nanoslime.models.tiny import tiny_qwen3_config
from nanoslime.plugins import resolve
from nanoslime.processes.ports import free_port
from nanoslime.storage.shared_files import read_json
from nanoslime.training import BACKENDS
from nanoslime.training.backend import RankEnv, TrainBackend, init_process_group
from tools import bench_logprobs
from tools.memory.estimate import estimate_memory

# Dense bfloat16 peak of one H100 or H200 SXM by NVIDIA's data sheet.
PEAK_FLOPS = 989e12
# A GPU's kernels sum in another order. bfloat16 has 8 bits, and the reference is in float32.
PARITY_LIMITS = {
    "float32": {"logprobs": 1e-4, "loss": 1e-4, "grad_norm": 1e-4, "parameters": 1e-4},
    "bfloat16": {"logprobs": 0.2, "loss": 0.05, "grad_norm": 0.05, "parameters": 0.02},
}
TEMPERATURE = 0.7
ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the checks are."""

    device: Literal["cuda", "cpu"]
    model: dict[str, int]  # fields of Qwen3Config
    logprob_tokens: int
    long_logprob_tokens: int  # too many for whole logits
    # The sequences of a train step, by the name of the case.
    steps: dict[str, list[int]]
    ipc_bytes: int
    num_rollout: int


QWEN3_06B = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 1 << 17,
}
TINY = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}
FULL = Sizes(
    device="cuda",
    model=QWEN3_06B,
    logprob_tokens=8192,
    long_logprob_tokens=65_536,
    steps={
        "16k tokens, 1 sequence": [16_384],
        "16k tokens, 32 sequences": [512] * 32,
        "64k tokens, 1 sequence": [65_536],
    },
    ipc_bytes=1 << 30,
    num_rollout=20,
)
SMALL = Sizes(
    device="cpu",
    model=TINY,
    logprob_tokens=64,
    long_logprob_tokens=256,
    steps={"128 tokens, 1 sequence": [128], "128 tokens, 8 sequences": [16] * 8},
    ipc_bytes=1 << 16,
    num_rollout=2,
)


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number; `limit` is the largest value that passes, if any."""

    name: str
    value: float
    unit: str
    limit: float | None = None

    @property
    def passed(self) -> bool | None:
        """Whether the value is within its limit; None without one. NaN never is."""
        if self.limit is None:
            return None
        return self.value <= self.limit


def parity(sizes: Sizes, directory: Path) -> Iterator[Figure]:
    """Two train steps of each backend in each dtype, beside FSDP on the CPU in float32."""
    model_dir = directory / "parity-model"
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config.from_dict(tiny_qwen3_config())).save_pretrained(model_dir)
    vocab_size = tiny_qwen3_config()["vocab_size"]
    lengths = [17, 9, 24, 5, 12, 21, 8, 15]
    env = _rank_env(sizes.device)
    # One group serves all backends: on CUDA it has a backend for tensors of the CPU too.
    init_process_group(env, TrainingConfig())
    problem = _ParityProblem(model_dir, make_batch(lengths, vocab_size, sequences=2), env)
    expected = problem.solve("fsdp", "float32", "cpu")
    for backend in ("fsdp", "megatron"):
        for dtype, limits in PARITY_LIMITS.items():
            found = problem.solve(backend, dtype, sizes.device)
            for quantity, difference in found.differences(expected).items():
                name = f"{backend} {dtype}: {quantity}"
                yield Figure(name, difference, "difference", limits[quantity])


@dataclass(frozen=True, slots=True)
class _Solution:
    """What two train steps gave."""

    logprobs: Tensor  # [all tokens], under the first weights
    steps: list[StepMetrics]
    parameters: dict[str, Tensor]  # after the last step

    def differences(self, expected: "_Solution") -> dict[str, float]:
        """The largest ones: absolute for logprobs and parameters, else relative."""
        losses = []
        norms = []
        for step, other in zip(self.steps, expected.steps, strict=True):
            losses.append(abs(step.loss - other.loss) / abs(other.loss))
            norms.append(abs(step.grad_norm - other.grad_norm) / other.grad_norm)
        parameters = []
        for name, value in self.parameters.items():
            parameters.append(float((value - expected.parameters[name]).abs().max()))
        return {
            "logprobs": float((self.logprobs - expected.logprobs).abs().max()),
            "loss": max(losses),
            "grad_norm": max(norms),
            "parameters": max(parameters),
        }


@dataclass(frozen=True, slots=True)
class _ParityProblem:
    model_dir: Path
    batch: TrainBatch
    env: RankEnv

    def solve(self, backend_name: str, dtype: str, device: Literal["cuda", "cpu"]) -> _Solution:
        config = RunConfig(
            model=ModelConfig(dtype=dtype),
            algorithm=GRPOConfig(use_kl_loss=True, kl_loss_coef=0.1),
            rollout=RolloutConfig(num_rollout=5, rollout_batch_size=8),
            # With a small adam_eps, Adam makes steps of lr out of the rounding of gradients.
            training=TrainingConfig(
                backend=backend_name, lr=1e-2, adam_eps=1e-3, weight_decay=0.1, clip_grad=0.05
            ),
        )
        env = RankEnv(0, 1, 0, device, self.env.init_method)
        backend = make_backend(config, self.model_dir, env)
        algorithm = algorithms.make(config.algorithm)
        logprobs = backend.logprobs(self.batch, "policy")
        steps = [backend.train_step(self.batch, algorithm) for _ in range(2)]
        parameters: dict[str, Tensor] = {}
        for shard in backend.weight_shards():
            whole = parameters.setdefault(shard.name, torch.zeros(shard.full_shape))
            whole[shard.slices] = shard.tensor.detach().float().cpu()
        return _Solution(torch.cat(logprobs), steps, parameters)


def logprobs(sizes: Sizes, directory: Path) -> Iterator[Figure]:
    """The trainers' logprobs beside those by whole logits: forward and backward, in bfloat16."""
    found = {}
    for way in bench_logprobs.WAYS:
        seconds, extra_bytes, found[way] = _logprobs(way, sizes.logprob_tokens, sizes)
        name = f"{way}, {sizes.logprob_tokens:,} tokens"
        yield Figure(f"{name}: time", seconds, "s")
        yield Figure(f"{name}: extra memory", extra_bytes / 1e9, "GB")
    names = ("logprobs", "entropy", "gradient of hidden", "gradient of the weight")
    for name, ours, theirs in zip(names, found["nanoslime"], found["naive"], strict=True):
        scale = float(theirs.float().abs().max())
        difference = float((ours.float() - theirs.float()).abs().max()) / scale
        yield Figure(f"{name} beside whole logits", difference, "of the largest", 0.02)
    seconds, extra_bytes, _ = _logprobs("nanoslime", sizes.long_logprob_tokens, sizes)
    name = f"nanoslime, {sizes.long_logprob_tokens:,} tokens"
    yield Figure(f"{name}: time", seconds, "s")
    yield Figure(f"{name}: extra memory", extra_bytes / 1e9, "GB")


def _logprobs(way: str, num_tokens: int, sizes: Sizes) -> tuple[float, int, list[Tensor]]:
    """Median seconds, extra bytes, and the results of the last call."""
    torch.manual_seed(0)
    place = {"device": sizes.device, "dtype": torch.bfloat16}
    vocab_size = sizes.model["vocab_size"]
    hidden_size = sizes.model["hidden_size"]
    hidden = torch.randn(num_tokens, hidden_size, **place).requires_grad_()
    weight = torch.randn(vocab_size, hidden_size, **place).mul_(0.05).requires_grad_()
    targets = torch.randint(vocab_size, (num_tokens,), device=sizes.device)
    upstream = torch.randn(2, num_tokens, device=sizes.device) / num_tokens
    inputs = [hidden, weight, targets]
    call = partial(
        bench_logprobs.forward_and_backward, way, inputs, upstream, entropy_gradient=True
    )
    call()
    seconds = []
    for _ in range(ROUNDS):
        before = bench_logprobs.start_peak_memory(sizes.device)
        begin = time.perf_counter()
        found = call()
        peak = bench_logprobs.peak_memory(sizes.device)  # waits for the device
        seconds.append(time.perf_counter() - begin)
        extra_bytes = peak - before - sum(tensor.nbytes for tensor in found)
        results = [tensor.cpu() for tensor in found]
        del found
    return statistics.median(seconds), extra_bytes, results


def train_steps(backend_name: str, sizes: Sizes, directory: Path) -> Iterator[Figure]:
    """Train steps in bfloat16 and their peak memory; then the rank sleeps and wakes."""
    model_dir = directory / "model"
    if not model_dir.exists():
        _make_model(sizes, model_dir)
    backend: TrainBackend | None = None
    env = _rank_env(sizes.device)
    for case, lengths in sizes.steps.items():
        backend = None  # its memory would count in the next case
        gc.collect()
        config = _train_config(backend_name, sum(lengths), model_dir, sizes)
        backend = make_backend(config, model_dir, env)
        batch = make_batch(lengths, sizes.model["vocab_size"], sequences=len(lengths))
        name = f"{backend_name}, {case}"
        if config.training.recompute:
            name += ", recomputed"
        yield from _time_steps(name, backend, batch, config, model_dir, sizes.device)
    yield from _sleep(backend_name, backend, sizes.device)


def _make_model(sizes: Sizes, model_dir: Path) -> None:
    config = Qwen3Config(**sizes.model, tie_word_embeddings=True, rope_theta=1e6)
    torch.manual_seed(0)
    with torch.device(sizes.device):
        model = Qwen3ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(model_dir)


def _train_config(backend: str, num_tokens: int, model_dir: Path, sizes: Sizes) -> RunConfig:
    """It recomputes where the activations would take more than half of the GPU's memory."""

    def config(recompute: bool) -> RunConfig:
        training = TrainingConfig(
            backend=backend, max_tokens_per_microbatch=num_tokens, recompute=recompute, lr=1e-6
        )
        return RunConfig(model=ModelConfig(dtype="bfloat16"), training=training)

    plain = config(recompute=False)
    if sizes.device == "cpu":
        return plain
    memory = torch.cuda.get_device_properties(0).total_memory
    return config(recompute=_estimated_bytes(plain, model_dir) > memory / 2)


def _estimated_bytes(config: RunConfig, model_dir: Path) -> int:
    """The plan's estimate for a trainer that is alone."""
    alone = ParallelDims(tp=1, pp=1, cp=1, ep=1, dp=1)
    trainer = estimate_memory(config, ModelShape.read(model_dir), alone).trainer
    assert trainer is not None
    return trainer.at_budget


def _time_steps(
    name: str,
    backend: TrainBackend,
    batch: TrainBatch,
    config: RunConfig,
    model_dir: Path,
    device: str,
) -> Iterator[Figure]:
    algorithm = algorithms.make(config.algorithm)
    backend.train_step(batch, algorithm)
    bench_logprobs.start_peak_memory(device)
    seconds = []
    for _ in range(ROUNDS):
        seconds.append(_seconds(partial(backend.train_step, batch, algorithm), device))
    peak = bench_logprobs.peak_memory(device)
    logprobs_s = _seconds(partial(backend.logprobs, batch, "policy"), device)
    step_s = statistics.median(seconds)
    lengths = [len(ids) for ids in batch.token_ids]
    shape = ModelShape.read(model_dir)
    flops = step_flops(shape, lengths, causal=False)
    causal_flops = step_flops(shape, lengths, causal=True)
    estimate = _estimated_bytes(config, model_dir)
    yield Figure(f"{name}: train step", step_s, "s")
    yield Figure(f"{name}: speed", sum(lengths) / step_s, "tokens/s")
    yield Figure(f"{name}: MFU", 100 * flops / step_s / PEAK_FLOPS, "%")
    yield Figure(f"{name}: MFU, causal", 100 * causal_flops / step_s / PEAK_FLOPS, "%")
    yield Figure(f"{name}: logprobs", logprobs_s, "s")
    yield Figure(f"{name}: peak memory", peak / 1e9, "GB")
    yield Figure(f"{name}: peak memory by the plan", estimate / 1e9, "GB")


def step_flops(shape: ModelShape, lengths: list[int], *, causal: bool) -> float:
    """Floating-point operations of a train step, as arXiv 2204.02311 appendix B counts them.

    That is 6 for each parameter and token, and 12 layers x heads x head size x length for
    the attention of each token, with no mask; `causal` counts half of the attention.
    Recomputation does not count.
    """
    attention = 12 * shape.num_layers * shape.num_attention_heads * shape.head_dim
    if causal:
        attention /= 2
    total = 0.0
    for length in lengths:
        total += length * (6 * shape.num_parameters + attention * length)
    return total


def _sleep(backend_name: str, backend: TrainBackend, device: str) -> Iterator[Figure]:
    before = _allocated_bytes(device)
    weights = [shard.tensor.detach().cpu().clone() for shard in backend.weight_shards()]
    sleep_s = _seconds(backend.sleep, device)
    asleep = _allocated_bytes(device)
    wake_s = _seconds(backend.wake, device)
    after = _allocated_bytes(device)
    awake = [shard.tensor.detach().cpu() for shard in backend.weight_shards()]
    changed = sum(not a.equal(b) for a, b in zip(weights, awake, strict=True))
    # torch counts the bytes of a GPU only.
    share_asleep = asleep / before if before else 0.0
    yield Figure(f"{backend_name}: memory before sleep", before / 1e9, "GB")
    yield Figure(f"{backend_name}: memory asleep", asleep / 1e9, "GB")
    yield Figure(f"{backend_name}: share that stays asleep", share_asleep, "of before", 0.05)
    yield Figure(f"{backend_name}: memory after wake", after / 1e9, "GB")
    yield Figure(f"{backend_name}: sleep", sleep_s, "s")
    yield Figure(f"{backend_name}: wake", wake_s, "s")
    yield Figure(f"{backend_name}: tensors that sleep changed", changed, "tensors", 0)


def ipc(sizes: Sizes, directory: Path) -> Iterator[Figure]:
    """A tensor that another process reads by its handle, as colocated weight sync hands it over."""
    tensor = torch.arange(sizes.ipc_bytes // 4, dtype=torch.int32, device=sizes.device)
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    reader = context.Process(target=_read_handle, args=(theirs,), daemon=True)
    reader.start()
    ours.recv()  # it has imported torch
    begin = time.perf_counter()
    payload = bytes(ForkingPickler.dumps(tensor))
    ours.send(payload)
    received = ours.recv()
    seconds = time.perf_counter() - begin
    reader.join()
    wrong = abs(received - int(tensor.sum()))
    yield Figure(f"handle of {sizes.ipc_bytes / 1e9:.3g} GB: sent and read", seconds, "s")
    yield Figure("handle: size of the payload", len(payload), "bytes")
    yield Figure("handle: error of the sum in the other process", wrong, "", 0)


def _read_handle(pipe: Any) -> None:
    pipe.send("ready")
    tensor = ForkingPickler.loads(pipe.recv())
    pipe.send(int(tensor.sum()))
    del tensor


def whole_run(backend_name: str, sizes: Sizes, directory: Path) -> Iterator[Figure]:
    """`python -m nanoslime.train --mock` with the embedded engine on the same device."""
    run_root = directory / f"runs-{backend_name}"
    flags = ["--mock", "--backend", backend_name, "--run-root", str(run_root)]
    flags += ["--num-rollout", str(sizes.num_rollout)]
    if sizes.device == "cuda":
        flags += ["--cluster.gpus-per-node", "1"]
    code = train.main(flags)
    if code:
        raise RuntimeError(f"the run ended with exit status {code}; its messages stand above")
    summary = read_json(run_root / "mock" / "summary.json")
    gain = summary["reward_after"] - summary["reward_before"]
    yield Figure(f"{backend_name}: rollouts", summary["steps"], "")
    yield Figure(f"{backend_name}: all", summary["seconds"], "s")
    yield Figure(f"{backend_name}: gain of reward", gain, "")
    yield Figure(f"{backend_name}: logprob gap to the engine", summary["logprob_gap_max"], "", 1e-3)


SECTIONS: dict[str, Callable[[Sizes, Path], Iterator[Figure]]] = {
    "parity": parity,
    "logprobs": logprobs,
    "train-fsdp": partial(train_steps, "fsdp"),
    "train-megatron": partial(train_steps, "megatron"),
    "ipc": ipc,
    "run-fsdp": partial(whole_run, "fsdp"),
    "run-megatron": partial(whole_run, "megatron"),
}


def make_batch(lengths: list[int], vocab_size: int, *, sequences: int) -> TrainBatch:
    """Random sequences, `sequences` of them in a micro-batch; the first quarter is the prompt."""
    generator = torch.Generator().manual_seed(0)
    token_ids = [torch.randint(1, vocab_size, (n,), generator=generator) for n in lengths]
    masks = [torch.arange(n) >= max(1, n // 4) for n in lengths]
    old_logprobs = []
    for length in lengths:
        noise = 0.05 * torch.randn(length, generator=generator)
        old_logprobs.append(noise - math.log(vocab_size))
    num_tokens = int(sum(mask.sum() for mask in masks))
    indices = list(range(len(lengths)))
    return TrainBatch(
        token_ids=token_ids,
        loss_mask=masks,
        rollout_logprobs=old_logprobs,
        old_logprobs=old_logprobs,
        ref_logprobs=old_logprobs,
        advantages=torch.randn(len(lengths), generator=generator).tolist(),
        token_weights=[1.0] * len(lengths),
        microbatches=[indices[i : i + sequences] for i in range(0, len(indices), sequences)],
        denominator=float(num_tokens),
        num_tokens=num_tokens,
        num_sequences=len(lengths),
        temperature=TEMPERATURE,
    )


def make_backend(config: RunConfig, model_dir: Path, env: RankEnv) -> TrainBackend:
    backend_class = resolve(config.training.backend, BACKENDS, "training.backend")
    return backend_class(config, model_dir, env)


def _rank_env(device: Literal["cuda", "cpu"]) -> RankEnv:
    return RankEnv(0, 1, 0, device, f"tcp://127.0.0.1:{free_port('127.0.0.1')}")


def _seconds(call: Callable[[], object], device: str) -> float:
    begin = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def sees_gpu() -> bool:
    return torch.cuda.is_available()


def device_name(device: str) -> str:
    if device == "cpu":
        return "CPU"
    return torch.cuda.get_device_name()


def _allocated_bytes(device: str) -> int:
    if device == "cpu":
        return 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()
