"""The FSDP2 backend: data parallelism of a transformers model, for one node or where Megatron has no model.

files -> shards (fsdp_model) -> packed forward to logprobs -> loss, a sum -> summed gradients -> clip -> AdamW
"""

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from nanoslime.batch import TrainBatch, WeightShard
from nanoslime.config.run import RunConfig
from nanoslime.config.training import TrainingConfig
from nanoslime.models.trainable import check_data_parallel_only
from nanoslime.training.backend import Algorithm, RankEnv, TrainBackend, init_process_group
from nanoslime.training.fsdp_model import build_sharded, local_rows
from nanoslime.training.metrics import MetricSums, ReducedMetrics
from nanoslime.training.skipping import Progress


class FSDPBackend(TrainBackend):
    """Joins the default process group where that has not been done."""

    is_last_stage = True

    def __init__(self, config: RunConfig, model_dir: Path, env: RankEnv) -> None:
        check_data_parallel_only(config.training)
        super().__init__(config, env)
        init_process_group(env, config.training)
        self.dp_rank, self.dp_size = env.rank, env.world_size
        mesh = init_device_mesh(env.device, (env.world_size,))
        self._policy = build_sharded(model_dir, config, mesh, self._device)
        self._model = self._policy.causal_lm
        self._optimizer = _make_optimizer(self._model, config.training)
        self._keep_reference()

    def all_sum(self, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    def weight_shards(self) -> Iterator[WeightShard]:
        """Own rows of each tensor, float32; of tied tensors the first name only."""
        return self._shards(of_gradients=False)

    def grad_shards(self) -> Iterator[WeightShard]:
        return self._shards(of_gradients=True)

    def save(self, path: Path) -> None:
        dcp.save(self._state(), checkpoint_id=path)

    def load(self, path: Path) -> None:
        """Reads what `save` wrote, by any number of ranks."""
        stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        # fewer ranks leave fewer generators' states
        state = {k: v for k, v in self._state().items() if k in stored or not k.startswith("rng.")}
        dcp.load(state, checkpoint_id=path)
        self._past = Progress(**state["progress"])
        for name, generator in self._generators().items():
            if name in state:
                generator.set_state(state[name])

    def _packed_logprobs(
        self, shard: TrainBatch, weights: Literal["policy", "ref"]
    ) -> list[Tensor]:
        return [
            self._policy(shard.microbatch(i).to(self._device))[0].cpu() for i in shard.microbatches
        ]

    def _backward(self, shard: TrainBatch, algorithm: Algorithm) -> ReducedMetrics:
        self._optimizer.zero_grad()
        sums = MetricSums()
        for indices in shard.microbatches:
            batch = shard.microbatch(indices).to(self._device)
            logprobs, entropy = self._policy(batch, with_entropy=algorithm.needs_entropy)
            loss, metrics = algorithm.loss(logprobs, entropy, batch)
            (loss / batch.denominator).backward()
            sums.add(loss, metrics, logprobs, batch)
        return sums.reduce(dist.group.WORLD)

    def _grads(self) -> list[Tensor]:
        return [p.grad.to_local() for p in self._model.parameters() if p.grad is not None]

    def _grad_norm(self) -> float:
        squares = torch.stack([grad.double().square().sum() for grad in self._grads()]).sum()
        return math.sqrt(self.all_sum(squares).item())

    def _update(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()

    def _parameters(self) -> list[Tensor]:
        return [p.detach().to_local() for p in self._model.parameters()]

    def _live_tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        self._optimizer.zero_grad()
        states = [value for state in self._optimizer.state.values() for value in state.values()]
        moments = [value.to_local() for value in states if isinstance(value, DTensor)]
        return [*self._parameters(), *self._model.buffers(), *moments], []

    def _shards(self, *, of_gradients: bool) -> Iterator[WeightShard]:
        for name, param in self._model.named_parameters():
            rows = local_rows(param)
            value = param.grad if of_gradients else param.detach()
            if rows.start < rows.stop and value is not None:
                slices = (rows, *(slice(0, size) for size in param.shape[1:]))
                yield WeightShard(name, tuple(param.shape), slices, value.to_local())

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds, by flat names. Tensors are the live ones: loading fills them in place."""
        state: dict[str, Any] = {"progress": asdict(self._past)}
        for name, param in self._model.named_parameters():
            moments = self._optimizer.state[param] if param.requires_grad else {}
            if param.requires_grad and not moments:  # before the first step
                moments["step"] = torch.tensor(0.0)
                moments["exp_avg"] = torch.zeros_like(param)
                moments["exp_avg_sq"] = torch.zeros_like(param)
            state[f"model.{name}"] = param.detach()
            state |= {f"optimizer.{name}.{kind}": value for kind, value in moments.items()}
        return state | {
            name: generator.get_state() for name, generator in self._generators().items()
        }

    def _generators(self) -> dict[str, torch.Generator]:
        generators = {f"rng.{self.dp_rank}.cpu": torch.default_generator}
        if self._device.type == "cuda":
            generators[f"rng.{self.dp_rank}.cuda"] = torch.cuda.default_generators[
                self._device.index
            ]
        return generators


def _make_optimizer(model: torch.nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) without decay of vectors (norms, biases)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() >= 2]
    others = {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, others]
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.adam_eps)
