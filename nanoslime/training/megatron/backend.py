"""The Megatron trainer rank: TrainBackend on GPTModel."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from nanoslime.batch import TrainBatch, WeightShard
from nanoslime.config import RunConfig
from nanoslime.models.shape import ModelShape
from nanoslime.models.trainable import check_kernels, check_parallel
from nanoslime.storage.safetensors_file import SIDE, copy_other_files
from nanoslime.training.backend import Algorithm, RankEnv, TrainBackend
from nanoslime.training.megatron import checkpoint, cpu_compat, model, optimizer, parallel, weights
from nanoslime.training.megatron.routing_replay import install_replay
from nanoslime.training.megatron.step import Pipeline
from nanoslime.training.metrics import ReducedMetrics


class MegatronBackend(TrainBackend):
    def __init__(self, config: RunConfig, model_dir: Path, env: RankEnv) -> None:
        super().__init__(config, env)
        self._shape, self._model_dir = ModelShape.read(model_dir), model_dir
        check_parallel(config.training, self._shape, env.world_size, slots=env.world_size)
        if env.device == "cuda":
            found = model.has_transformer_engine(self._device)
            check_kernels(config.training, self._shape, transformer_engine=found)
        cpu_compat.install()
        self._ranks = ranks = parallel.initialize(config.training, env, config.seed)
        self.dp_rank, self.dp_size = ranks.dp_rank, ranks.dp_size
        self.is_last_stage = ranks.is_last_stage
        distributed = model.build(self._shape, config, ranks, self._device)
        self._pieces = [model.unwrap(piece) for piece in distributed]
        here = zip(self._pieces, ranks.parts(self._shape), strict=True)
        self._weights_here = [
            b for piece, part in here for b in weights.bind(piece, self._shape, part)
        ]
        weights.load(self._weights_here, self._shape, model_dir)
        self._optimizer = optimizer.build(distributed, config)
        self._replay = config.training.routing_replay
        if self._replay != "none":
            install_replay(self._pieces, self._shape)
        self._pipeline = Pipeline(distributed, self._shape, ranks, self._device)
        self._keep_reference()

    def all_sum(self, value: Tensor) -> Tensor:
        total = value.to(self._device, copy=True)
        dist.all_reduce(total, group=self._ranks.dp_group)
        return total.to(value.device)

    def weight_shards(self) -> Iterator[WeightShard]:
        return weights.shards(self._weights_here)

    def grad_shards(self) -> Iterator[WeightShard]:
        return weights.shards(self._weights_here, "main_grad")

    def save(self, path: Path) -> None:
        checkpoint.save(path, self._pieces, self._optimizer, self._past, self._ranks)
        if dist.get_rank() == 0:  # with these it converts back to Hugging Face's format
            copy_other_files(self._model_dir, path / SIDE)

    def load(self, path: Path) -> None:
        self._past = checkpoint.load(path, self._pieces, self._optimizer, self._ranks)

    def _packed_logprobs(
        self, shard: TrainBatch, weights: Literal["policy", "ref"]
    ) -> list[Tensor]:
        if weights == "ref":
            shard = replace(shard, routed_experts=None)
        elif self._replay == "R2" and (moe := self._shape.moe):
            size = (len(self._shape.moe_layers), moe.num_experts_per_token)
            free = [torch.full((len(ids), *size), -1, dtype=torch.int16) for ids in shard.token_ids]
            shard.routed_experts = free  # the pass fills in what this rank's routers choose
        return self._pipeline.logprobs(shard)

    def _backward(self, shard: TrainBatch, algorithm: Algorithm) -> ReducedMetrics:
        if self._replay != "none" and shard.routed_experts is None:
            source = (
                "the samples hold none"
                if self._replay == "R3"
                else "logprobs were not computed before"
            )
            raise ValueError(f"training.routing_replay={self._replay}: no routed experts; {source}")
        self._optimizer.zero_grad()
        return parallel.from_last_stage(self._pipeline.gradients(shard, algorithm), self._ranks)

    def _grad_norm(self) -> float:
        self._optimizer.prepare_grads()
        return float(self._optimizer.get_grad_norm())

    def _grads(self) -> list[Tensor]:
        parameters = (
            p for inner in self._optimizer.chained_optimizers for p in inner.get_parameters()
        )
        grads = (
            getattr(p, "decoupled_grad", p.grad) for p in parameters
        )  # the former when it is offloaded
        return [grad for grad in grads if grad is not None]

    def _update(self, lr: float) -> None:
        optimizer.set_rates(self._optimizer, lr, self._training.weight_decay)
        self._optimizer.step_with_ready_grads()

    def _parameters(self) -> list[Tensor]:
        return [p.detach() for piece in self._pieces for p in piece.parameters()]

    def _live_tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        self._optimizer.zero_grad()
        buffers = [buffer for piece in self._pieces for buffer in piece.buffers()]
        grads = [
            p.main_grad for piece in self._pieces for p in piece.parameters() if p.requires_grad
        ]
        return [*self._parameters(), *buffers, *optimizer.tensors(self._optimizer)], grads
