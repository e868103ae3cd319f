"""The Megatron trainer rank: TrainBackend on GPTModel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from nanoslime.batch import StepMetrics, TrainBatch, WeightShard
from nanoslime.config import RunConfig
from nanoslime.models.shape import ModelShape
from nanoslime.training.backend import Algorithm, RankEnv
from nanoslime.training.megatron import checkpoint, cpu_compat, model, optimizer, parallel, weights
from nanoslime.training.megatron.step import Pipeline
from nanoslime.training.schedule import lr_at


class MegatronBackend:
    """One rank. Construction is collective: it joins the process group and loads the weights of
    `model_dir`.
    """

    def __init__(self, config: RunConfig, model_dir: Path, env: RankEnv) -> None:
        self._config = config
        self._shape = ModelShape.read(model_dir)
        parallel.check(config.training, self._shape, env.world_size)
        cpu_compat.install()
        self._ranks = ranks = parallel.initialize(config.training, env, config.seed)
        self.dp_rank, self.dp_size = ranks.dp_rank, ranks.dp_size
        self.is_last_stage = ranks.is_last_stage
        self._device = env.torch_device
        self._model = model.build(self._shape, config, ranks, self._device)
        self._gpt = model.unwrap(self._model)
        self._weights = weights.bind(self._gpt, self._shape, ranks.part(self._shape.num_layers))
        weights.load(self._weights, self._shape, model_dir)
        self._optimizer = optimizer.build(self._model, config)
        self._pipeline = Pipeline(self._model, self._shape, ranks, self._device)
        self._step = 0
        self._reference: list[Tensor] = []
        if config.algorithm.needs_reference:
            self._reference = [p.detach().to("cpu", copy=True) for p in self._gpt.parameters()]

    def logprobs(self, shard: TrainBatch, weights: Literal["policy", "ref"]) -> list[Tensor] | None:
        """[T_i] float32 per sequence on the last pipeline stage, in the order of `shard.token_ids`; None
        elsewhere.
        """
        with self._reference_weights() if weights == "ref" else nullcontext():
            return self._pipeline.logprobs(shard)

    def train_step(self, shard: TrainBatch, algorithm: Algorithm) -> StepMetrics:
        """Forward, backward and optimizer step over the shard's micro-batches; the same result on every
        rank.
        """
        training, rollout = self._config.training, self._config.rollout
        total_steps = rollout.num_rollout * training.num_steps_per_rollout
        lr = lr_at(self._step, config=training, total_steps=total_steps)
        self._optimizer.zero_grad()
        values = self._pipeline.gradients(shard, algorithm)
        optimizer.set_rates(self._optimizer, lr, training.weight_decay)
        norm, skipped = optimizer.update(self._optimizer, training.clip_grad)
        self._step += 1
        values = parallel.from_last_stage(values, self._ranks)
        return StepMetrics(loss=values.pop("loss"), grad_norm=norm, lr=lr, skipped=skipped, values=values)

    def all_sum(self, value: Tensor) -> Tensor:
        """Sum over the data-parallel ranks, in a new tensor."""
        total = value.to(self._device, copy=True)
        dist.all_reduce(total, group=self._ranks.dp_group)
        return total.to(value.device)

    def weight_shards(self) -> Iterator[WeightShard]:
        """This rank's pieces of the Hugging Face tensors as views of the parameters, always in the same
        order.
        """
        return weights.shards(self._weights)

    def grad_shards(self) -> Iterator[WeightShard]:
        """The gradients of the last train_step, clipped, in float32; pieces as in weight_shards.

        Summed over data parallelism, except under the distributed optimizer, where a rank has only its share.
        """
        return weights.shards(self._weights, "main_grad")

    def save(self, path: Path) -> None:
        """Writes weights, optimizer, RNG and schedule into the existing empty directory `path`;
        collective.
        """
        checkpoint.save(path, self._gpt, self._optimizer, self._step, self._ranks)

    def load(self, path: Path) -> None:
        """Restores what `save` wrote; collective."""
        self._step = checkpoint.load(path, self._gpt, self._optimizer, self._ranks)

    @contextmanager
    def _reference_weights(self) -> Iterator[None]:
        """The weights that this backend was constructed with, in place of the policy's for a while."""
        if not self._reference:
            raise ValueError("no reference weights are held: the algorithm is configured without a KL term")
        parameters = list(self._gpt.parameters())
        policy = [p.detach().to("cpu", copy=True) for p in parameters]
        _copy(self._reference, parameters)
        try:
            yield
        finally:
            _copy(policy, parameters)


@torch.no_grad()
def _copy(source: list[Tensor], target: list[torch.nn.Parameter]) -> None:
    for values, parameter in zip(source, target, strict=True):
        parameter.copy_(values)
