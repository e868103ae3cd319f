"""The whole configuration of one run, as its run directory holds it and every process of it reads it."""

from typing import Self

from pydantic import Field, model_validator

from nanoslime.config.algorithm import AlgorithmConfig, GRPOConfig
from nanoslime.config.base import knobs
from nanoslime.config.cluster import ClusterConfig
from nanoslime.config.model import DataConfig, ModelConfig, RehearsalConfig
from nanoslime.config.rollout import EvalConfig, RolloutConfig, WeightSyncConfig
from nanoslime.config.training import CheckpointConfig, TrackingConfig, TrainingConfig


@knobs
class RunConfig:
    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Name of the run, of its directory and of its job."""
    seed: int = 0
    model: ModelConfig = Field(default_factory=ModelConfig)
    rehearsal: RehearsalConfig = Field(default_factory=RehearsalConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = Field(default_factory=GRPOConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    weight_sync: WeightSyncConfig = Field(default_factory=WeightSyncConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.rehearsal.enabled and self.model.hf_checkpoint:
            given = f"model.hf_checkpoint={self.model.hf_checkpoint!r}"
            raise ValueError(
                f"rehearsal.enabled makes its own model; {given} needs --rehearsal.no-enabled"
            )
        asked = f"training.routing_replay={self.training.routing_replay}"
        if not asked.endswith("none") and self.training.backend != "megatron":
            raise ValueError(f"{asked} needs training.backend=megatron")
        if asked.endswith("R2") and self.algorithm.old_logprobs != "recomputed":
            raise ValueError(
                f"{asked} needs algorithm.old_logprobs=recomputed, a pass to record; or set R3"
            )
        if self.training.backend == "fsdp" and (
            self.training.sequence_parallel or self.training.megatron
        ):
            raise ValueError(
                "training.sequence_parallel and training.megatron need backend=megatron"
            )
        steps, prompts = self.training.num_steps_per_rollout, self.rollout.rollout_batch_size
        if prompts % steps:
            name = f"training.num_steps_per_rollout={steps}"
            raise ValueError(f"{name} does not divide rollout.rollout_batch_size={prompts}")
        if (buffer := self.algorithm.overlong_buffer) > (limit := self.rollout.max_new_tokens):
            raise ValueError(
                f"algorithm.overlong_buffer={buffer} is above rollout.max_new_tokens={limit}"
            )
        self._check_half_a_run()
        return self

    def _check_half_a_run(self) -> None:
        """A replay has no engines, rollout-only has no trainer: refuses what speaks of what is not there."""
        rollout, transport, name = self.rollout, self.weight_sync.transport, self.algorithm.name
        if not (rollout.load_rollouts or rollout.rollout_only):
            if rollout.n_samples_per_prompt == 1 and name != "reinforce_plus_plus":
                raise ValueError(
                    f"rollout.n_samples_per_prompt=1: {name} compares samples; set 2 or more"
                )
            return
        if rollout.load_rollouts and rollout.rollout_only:
            raise ValueError(
                "rollout.load_rollouts and rollout.rollout_only exclude each other; set one"
            )
        mode = "rollout.load_rollouts" if rollout.load_rollouts else "rollout.rollout_only"
        given = {
            "weight_sync.transport": None if transport == "auto" else transport,
            "cluster.rollout_nodes": self.cluster.rollout_nodes,
            "cluster.engine_gpus": self.cluster.engine_gpus,
            "cluster.colocate": self.cluster.colocate or None,
            "training.num_gpus": self.training.num_gpus if rollout.rollout_only else None,
        }
        for field, value in given.items():
            if value is not None:
                raise ValueError(f"{field}={value} makes no sense with {mode}; leave it out")
