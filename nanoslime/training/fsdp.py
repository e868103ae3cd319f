"""The FSDP2 backend: data-parallel training of a transformers model, for one node and for architectures
without Megatron.

files -> shards (fsdp_model) -> packed forward -> logprobs -> loss, a sum -> summed gradients -> clip -> AdamW
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from nanoslime.batch import MicroBatch, StepMetrics, TrainBatch, WeightShard
from nanoslime.config.run import RunConfig
from nanoslime.config.training import TrainingConfig
from nanoslime.training.backend import Algorithm, RankEnv, init_process_group
from nanoslime.training.fsdp_model import build_sharded, local_rows, parameters_by_decay
from nanoslime.training.logprobs import token_logprobs
from nanoslime.training.metrics import MetricSums
from nanoslime.training.schedule import lr_at
from nanoslime.types import RunError


class FSDPBackend:
    """See TrainBackend. Joins the default process group where that has not been done."""

    is_last_stage = True

    def __init__(self, config: RunConfig, model_dir: Path, env: RankEnv) -> None:
        _refuse_other_dimensions(config.training)
        init_process_group(env, config.training.collective_deadline_s)
        self.dp_rank, self.dp_size = env.rank, env.world_size
        self._config, self._device = config.training, env.torch_device
        self._total_steps = config.rollout.num_rollout * config.training.num_steps_per_rollout
        self._step = 0  # of the optimizer, skipped ones included
        mesh = init_device_mesh(env.device, (env.world_size,))
        self._model = build_sharded(
            model_dir, config.model, mesh, self._device, recompute=config.training.recompute
        )
        self._optimizer = _make_optimizer(self._model, config.training)
        self._reference = None
        if config.algorithm.needs_reference:
            self._reference = [p.to_local().detach().cpu().clone() for p in self._model.parameters()]

    def logprobs(self, shard: TrainBatch, weights: Literal["policy", "ref"]) -> list[Tensor]:
        """[T_i] float32 per sequence, on the CPU, in the order of `shard.token_ids`."""
        result: list[Tensor] = [torch.empty(0)] * len(shard.token_ids)
        with torch.no_grad(), self._weights(weights):
            for indices in shard.microbatches:
                batch = shard.microbatch(indices)
                parts = self._forward(batch.to(self._device)).cpu().split(batch.lengths)
                for i, part in zip(indices, parts, strict=True):
                    result[i] = part
        return result

    def train_step(self, shard: TrainBatch, algorithm: Algorithm) -> StepMetrics:
        """A non-finite gradient norm skips the update; the learning rate schedule goes on."""
        self._optimizer.zero_grad()
        sums = MetricSums()
        for indices in shard.microbatches:
            batch = shard.microbatch(indices).to(self._device)
            logprobs = self._forward(batch)
            loss, metrics = algorithm.loss(logprobs, None, batch)
            (loss / batch.denominator).backward()
            sums.add({"train/loss": loss, **metrics}, logprobs, batch)
        grad_norm = self._clip_gradients()
        lr = lr_at(self._step, config=self._config, total_steps=self._total_steps)
        if math.isfinite(grad_norm):
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        self._step += 1
        values = sums.reduce(dist.group.WORLD, shard.denominator, shard.num_tokens)
        return StepMetrics(
            loss=values.pop("train/loss"),
            grad_norm=grad_norm,
            lr=lr,
            skipped=not math.isfinite(grad_norm),
            values=values,
        )

    def all_sum(self, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    def weight_shards(self) -> Iterator[WeightShard]:
        """Own rows of each tensor, float32; of tied tensors the first name only."""
        return self._shards(of_gradients=False)

    def grad_shards(self) -> Iterator[WeightShard]:
        """The gradients of the last train_step, after clipping, in the shape of weight_shards."""
        return self._shards(of_gradients=True)

    def save(self, path: Path) -> None:
        dcp.save(self._state(), checkpoint_id=path)

    def load(self, path: Path) -> None:
        """Reads what `save` wrote, by any number of ranks. The reference remains that of the model files."""
        state = self._state()
        stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        for name in [name for name in state if name.startswith("rng.") and name not in stored]:
            del state[name]  # written by fewer ranks
        dcp.load(state, checkpoint_id=path)
        self._step = state["step"]
        for name, generator in self._generators().items():
            if name in state:
                generator.set_state(state[name])

    def _forward(self, batch: MicroBatch) -> Tensor:
        # Without a mask, transformers separates packed sequences where the positions start again.
        output = self._model(
            input_ids=batch.token_ids[None], position_ids=batch.positions[None], use_cache=False
        )
        return token_logprobs(
            output.logits[0],
            batch.token_ids,
            batch.cu_seqlens,
            temperature=batch.temperature,
            vocab_size=self._model.config.vocab_size,
        )

    def _clip_gradients(self) -> float:
        """Scales the gradients to a global norm of at most clip_grad; returns the norm they had."""
        grads = [p.grad.to_local() for p in self._model.parameters() if p.grad is not None]
        squares = torch.stack([grad.double().square().sum() for grad in grads]).sum()
        norm = math.sqrt(self.all_sum(squares).item())
        if self._config.clip_grad and norm > self._config.clip_grad:
            torch._foreach_mul_(grads, self._config.clip_grad / (norm + 1e-6))
        return norm

    @contextmanager
    def _weights(self, which: Literal["policy", "ref"]) -> Iterator[None]:
        """The model's parameters are the reference's inside, where asked; the policy's again after it."""
        if which == "policy":
            yield
            return
        if self._reference is None:
            raise RunError(
                "reference logprobs need kl_coef > 0 or use_kl_loss; no reference weights are kept"
            )
        live = [p.to_local() for p in self._model.parameters()]
        policy = [local.clone() for local in live]
        try:
            torch._foreach_copy_(live, self._reference)
            yield
        finally:
            torch._foreach_copy_(live, policy)

    def _shards(self, *, of_gradients: bool) -> Iterator[WeightShard]:
        for name, param in self._model.named_parameters():
            rows = local_rows(param)
            value = param.grad if of_gradients else param.detach()
            if rows.start < rows.stop and value is not None:
                slices = (rows, *(slice(0, size) for size in param.shape[1:]))
                yield WeightShard(name, tuple(param.shape), slices, value.to_local())

    def _state(self) -> dict[str, Any]:
        """All that a checkpoint holds, by flat names. Tensors are the live ones, which loading fills in
        place.
        """
        state: dict[str, Any] = {"step": self._step}
        for name, param in self._model.named_parameters():
            moments = self._optimizer.state[param]
            if not moments:  # before the first step
                moments["step"] = torch.tensor(0.0)
                moments["exp_avg"] = torch.zeros_like(param)
                moments["exp_avg_sq"] = torch.zeros_like(param)
            state[f"model.{name}"] = param.detach()
            state |= {f"optimizer.{name}.{kind}": value for kind, value in moments.items()}
        return state | {name: generator.get_state() for name, generator in self._generators().items()}

    def _generators(self) -> dict[str, torch.Generator]:
        generators = {f"rng.{self.dp_rank}.cpu": torch.default_generator}
        if self._device.type == "cuda":
            generators[f"rng.{self.dp_rank}.cuda"] = torch.cuda.default_generators[self._device.index]
        return generators


def _refuse_other_dimensions(config: TrainingConfig) -> None:
    for field in ("tp_size", "pp_size", "cp_size", "ep_size"):
        if getattr(config, field) != 1:
            raise ValueError(
                f"training.{field}={getattr(config, field)}: the fsdp backend has data parallelism only; "
                f"set it to 1 or use training.backend=megatron"
            )


def _make_optimizer(model: torch.nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) without decay of vectors (norms, biases)."""
    matrices, vectors = parameters_by_decay(model)
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.lr, betas=betas, eps=config.adam_eps
    )
