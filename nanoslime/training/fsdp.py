"""The FSDP2 backend: data parallelism of a transformers model, for a single node.

files -> shards (fsdp_model) -> packed forward to logprobs -> loss, a sum -> summed
gradients -> clip -> AdamW
"""

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from nanoslime.algorithms.policy_gradient import PolicyGradient
from nanoslime.batch import OwnedShard, TrainBatch, WeightShard
from nanoslime.config.run import RunConfig
from nanoslime.config.training import TrainingConfig
from nanoslime.models.rules import whole
from nanoslime.models.trainable import check_data_parallel_only
from nanoslime.training.backend import RankEnv, TrainBackend, Weights, init_process_group
from nanoslime.training.fsdp_model import build_sharded, rows_of
from nanoslime.training.metrics import MetricSums, ReducedMetrics
from nanoslime.training.skipping import StepHistory


class FSDPBackend(TrainBackend):
    """TrainBackend on FSDP2. It joins the default process group if need be."""

    is_last_stage = True
    writes_logprobs = True

    def __init__(self, config: RunConfig, model_dir: Path, env: RankEnv) -> None:
        check_data_parallel_only(config.training)
        super().__init__(config, env)
        init_process_group(env, config.training)
        self.dp_rank = env.rank
        self.dp_size = env.world_size
        mesh = init_device_mesh(env.device, (env.world_size,))
        self._policy = build_sharded(model_dir, config, mesh, self._device)
        self._model = self._policy.causal_lm
        self._optimizer = _make_optimizer(self._model, config.training)
        self._keep_reference()

    def weight_shards(self) -> Iterator[WeightShard]:
        """This rank's rows of each tensor, float32; tied tensors come under their first
        name.
        """
        params = dict(self._model.named_parameters())
        for shard in self._rows_of(self.dp_rank):
            rows = params[shard.name].data.to_local()
            yield WeightShard(shard.name, shard.full_shape, shard.box, rows)

    def owned_shards(self) -> list[list[OwnedShard]]:
        return [self._rows_of(rank) for rank in range(self.dp_size)]

    def save(self, path: Path) -> None:
        dcp.save(self._state(), checkpoint_id=path)

    def load(self, path: Path) -> None:
        """Reads what `save` wrote, on any number of ranks."""
        stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        state = self._state()
        for name in self._generators():
            if name not in stored:  # saved by fewer ranks
                del state[name]
        dcp.load(state, checkpoint_id=path)
        self._history = StepHistory(**state["step_history"])
        for name, generator in self._generators().items():
            if name in state:
                generator.set_state(state[name])

    def _rows_of(self, rank: int) -> list[OwnedShard]:
        found = []
        for name, param in self._model.named_parameters():
            rows = rows_of(param, rank)
            if rows.start < rows.stop:
                box = (rows, *whole(param.shape[1:]))
                found.append(OwnedShard(name, tuple(param.shape), box))
        return found

    def _packed_logprobs(self, shard: TrainBatch, weights: Weights) -> list[Tensor]:
        packs = []
        for indices in shard.microbatches:
            batch = shard.microbatch(indices).to(self._device)
            logprobs, _ = self._policy(batch)
            packs.append(logprobs.cpu())
        return packs

    def _backward(self, shard: TrainBatch, algorithm: PolicyGradient) -> ReducedMetrics:
        self._optimizer.zero_grad()
        sums = MetricSums()
        for indices in shard.microbatches:
            pack = shard.microbatch(indices)
            in_loss = pack.loss_mask.nonzero().flatten() if pack.loss_mask.any() else None
            batch = pack.to(self._device)
            only = None if in_loss is None else in_loss.to(self._device)
            logprobs, entropy = self._policy(batch, with_entropy=True, only=only)
            loss, metrics = algorithm.loss(logprobs, entropy, batch)
            (loss / batch.denominator).backward()
            sums.add(loss, metrics, logprobs, batch)
        return sums.reduce(dist.group.WORLD)

    def _grads(self) -> list[Tensor]:
        return [p.grad.to_local() for p in self._model.parameters() if p.grad is not None]

    def _grad_norm(self) -> float:
        squares = torch.stack([grad.double().square().sum() for grad in self._grads()])
        return math.sqrt(self.all_sum(squares.sum()).item())

    def _update(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()

    def _parameters(self) -> list[Tensor]:
        return [p.detach().to_local() for p in self._model.parameters()]

    def _live_tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        self._optimizer.zero_grad()
        kept = [*self._parameters(), *self._model.buffers()]
        for state in self._optimizer.state.values():
            for value in state.values():
                if isinstance(value, DTensor):
                    kept.append(value.to_local())
        return kept, []

    def _state(self) -> dict[str, Any]:
        """The contents of a checkpoint, by flat names. Tensors are the live ones: loading
        fills them in place.
        """
        state: dict[str, Any] = {"step_history": asdict(self._history)}
        for name, param in self._model.named_parameters():
            state[f"model.{name}"] = param.detach()
            if param.requires_grad:
                for kind, value in self._optimizer_state(param).items():
                    state[f"optimizer.{name}.{kind}"] = value
        for name, generator in self._generators().items():
            state[name] = generator.get_state()
        return state

    def _optimizer_state(self, param: Tensor) -> dict[str, Tensor]:
        """AdamW's live state of a parameter, which is made here before the first step."""
        state = self._optimizer.state[param]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state

    def _generators(self) -> dict[str, torch.Generator]:
        """The random generators of this rank, by their names in a checkpoint."""
        generators = {f"rng.{self.dp_rank}.cpu": torch.default_generator}
        if self._device.type == "cuda":
            default = torch.cuda.default_generators[self._device.index]
            generators[f"rng.{self.dp_rank}.cuda"] = default
        return generators


def _make_optimizer(model: torch.nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) without decay of vectors (norms, biases)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() >= 2]
    vectors = [p for p in trained if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.adam_eps)
