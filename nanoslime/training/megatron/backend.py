"""The Megatron trainer rank: TrainBackend on GPTModel."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from nanoslime.algorithms.policy_gradient import PolicyGradient
from nanoslime.batch import OwnedShard, TrainBatch, WeightShard
from nanoslime.config import RunConfig
from nanoslime.models.shape import ModelShape
from nanoslime.models.trainable import check_kernels, check_parallel
from nanoslime.storage.safetensors_file import METADATA_DIR, copy_other_files
from nanoslime.training.backend import RankEnv, TrainBackend, Weights
from nanoslime.training.megatron import checkpoint, cpu_compat, model, optimizer, parallel, weights
from nanoslime.training.megatron.routing_replay import install_replay
from nanoslime.training.megatron.step import Pipeline
from nanoslime.training.metrics import ReducedMetrics


class MegatronBackend(TrainBackend):
    def __init__(self, config: RunConfig, model_dir: Path, env: RankEnv) -> None:
        super().__init__(config, env)
        self._model_dir = model_dir
        self._shape = ModelShape.read(model_dir)
        check_parallel(config.training, self._shape, env.world_size, slots=env.world_size)
        if env.device == "cuda":
            found = model.has_transformer_engine(self._device)
            check_kernels(config.training, self._shape, transformer_engine=found)
        cpu_compat.install()
        self._ranks = parallel.initialize(config.training, env, config.seed)
        self.dp_rank = self._ranks.dp_rank
        self.dp_size = self._ranks.dp_size
        self._dp_group = self._ranks.dp_group
        self.is_last_stage = self._ranks.is_last_stage
        is_first = self._ranks.place.tp_rank == 0 and self._ranks.cp_rank == 0
        self.writes_logprobs = self.is_last_stage and is_first
        self._distributed = model.build(self._shape, config, self._ranks, self._device)
        self._model_chunks = [model.unwrap(chunk) for chunk in self._distributed]
        self._parameter_pieces = self._bind()
        weights.load(self._parameter_pieces, self._shape, model_dir)
        self._optimizer = optimizer.build(self._distributed, config)
        self._trained = checkpoint.Trained(self._model_chunks, self._optimizer, self._ranks)
        self._replay = config.training.routing_replay
        if self._replay != "none":
            install_replay(self._model_chunks, self._shape)
        self._pipeline = Pipeline(self._distributed, self._shape, self._ranks, self._device)
        self._keep_reference()

    def weight_shards(self) -> Iterator[WeightShard]:
        return weights.shards(self._parameter_pieces)

    def owned_shards(self) -> list[list[OwnedShard]]:
        return weights.owned_shards(self._shape, self._training, dist.get_world_size())

    def save(self, path: Path) -> None:
        checkpoint.save(path, self._trained, self._history)
        if dist.get_rank() == 0:  # with these it converts back to Hugging Face's format
            copy_other_files(self._model_dir, path / METADATA_DIR)

    def load(self, path: Path) -> None:
        self._history = checkpoint.load(path, self._trained)

    def _bind(self) -> weights.ParameterPieces:
        found = []
        partitions = parallel.partitions(self._ranks.place, self._training, self._shape)
        for chunk, partition in zip(self._model_chunks, partitions, strict=True):
            found += weights.bind(chunk, self._shape, partition)
        return found

    def _packed_logprobs(self, shard: TrainBatch, weights: Weights) -> list[Tensor]:
        if weights == "ref":
            shard = replace(shard, routed_experts=None)
        elif self._replay == "R2" and self._shape.moe:
            # All unknown: the pass fills in what this rank's routers choose.
            size = (len(self._shape.moe_layers), self._shape.moe.num_experts_per_token)
            shard.routed_experts = [
                torch.full((len(ids), *size), -1, dtype=torch.int16) for ids in shard.token_ids
            ]
        return self._pipeline.logprobs(shard)

    def _backward(self, shard: TrainBatch, algorithm: PolicyGradient) -> ReducedMetrics:
        if self._replay == "R3" and shard.routed_experts is None:
            raise ValueError("training.routing_replay=R3: no routed experts; the samples hold none")
        self._optimizer.zero_grad()
        metrics = self._pipeline.gradients(shard, algorithm)
        return parallel.from_last_stage(metrics, self._ranks)

    def _grad_norm(self) -> float:
        self._optimizer.prepare_grads()
        return float(self._optimizer.get_grad_norm())

    def _grads(self) -> list[Tensor]:
        found = []
        for inner in self._optimizer.chained_optimizers:
            for parameter in inner.get_parameters():
                # An offloaded parameter has its gradient in decoupled_grad.
                grad = getattr(parameter, "decoupled_grad", parameter.grad)
                if grad is not None:
                    found.append(grad)
        return found

    def _update(self, lr: float) -> None:
        optimizer.set_rates(self._optimizer, lr, self._training.weight_decay)
        self._optimizer.step_with_ready_grads()

    def _parameters(self) -> list[Tensor]:
        return [p.detach() for chunk in self._model_chunks for p in chunk.parameters()]

    def _live_tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        self._optimizer.zero_grad()
        kept = self._parameters()
        grads = []
        for chunk in self._model_chunks:
            kept += chunk.buffers()
            grads += [p.main_grad for p in chunk.parameters() if p.requires_grad]
        kept += optimizer.tensors(self._optimizer)
        return kept, grads
