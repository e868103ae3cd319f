"""The whole configuration of one run, as its run directory holds it and every process
of it reads it."""

from dataclasses import replace
from typing import Literal, Self

from pydantic import Field, model_validator

from nanoslime.config.algorithm import AlgorithmConfig, CustomConfig, GRPOConfig
from nanoslime.config.base import knobs
from nanoslime.config.cluster import ClusterConfig
from nanoslime.config.evaluation import HELD_OUT, EvalConfig, EvalSetConfig
from nanoslime.config.model import DataConfig, ModelConfig, RehearsalConfig
from nanoslime.config.rollout import RolloutConfig, WeightSyncConfig
from nanoslime.config.training import (
    MEGATRON_ONLY,
    CheckpointConfig,
    TrackingConfig,
    TrainingConfig,
)


@knobs
class RunConfig:
    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Name of the run, of its directory and of its job."""
    seed: int = 0
    """Seed of the order of prompts, of sampling and of the trainers."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Which messages the logs of driver, trainer ranks, node agents and SGLang hold."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    """Which model is trained."""
    rehearsal: RehearsalConfig = Field(default_factory=RehearsalConfig)
    """The tiny model and task of a run without a checkpoint."""
    data: DataConfig = Field(default_factory=DataConfig)
    """Prompts and rewards."""
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    """How samples are drawn."""
    algorithm: AlgorithmConfig = Field(default_factory=GRPOConfig)
    """The algorithm and its settings."""
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    """Backend, parallel sizes and optimizer."""
    weight_sync: WeightSyncConfig = Field(default_factory=WeightSyncConfig)
    """How engines get new weights."""
    eval: EvalConfig = Field(default_factory=EvalConfig)
    """When the policy is evaluated, and on what."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """When the run is committed, and what is kept."""
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    """Where metrics go."""
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    """Nodes, SLURM and the site."""

    @property
    def old_logprobs(self) -> Literal["recomputed", "rollout", "current"]:
        """algorithm.old_logprobs, with what auto means in this run.

        The trainer's weights at the beginning of a rollout's steps are those of its first
        step. With one step, a pass before it gives what the step computes anyway, and a
        ratio of exactly 1: auto is then current. It is recomputed where the values are
        needed before the step (kl_coef, R2), by later steps, or by what a user's own
        algorithm may read.

        With rollout.max_staleness, these weights are not the policy that sampled. Where
        the correction weighs or rejects tokens by trainer over engine, the loss is the
        decoupled one (arXiv 2110.00641; AReaL, arXiv 2505.24298), whose proximal policy
        is the trainer at the beginning of its steps: as above. Without a correction,
        nothing but the ratio could know how stale a token is: auto is then rollout, each
        token's logprob under the very version that sampled it, and PPO's clip holds
        around that.
        """
        algorithm = self.algorithm
        if algorithm.old_logprobs != "auto":
            return algorithm.old_logprobs
        if self.training.routing_replay == "R2":
            return "recomputed"
        if self.rollout.max_staleness and not algorithm.correction.compares_with_engine:
            return "rollout"
        several_steps = self.training.num_steps_per_rollout > 1
        if several_steps or algorithm.kl_coef > 0 or isinstance(algorithm, CustomConfig):
            return "recomputed"
        return "current"

    @property
    def training_algorithm(self) -> AlgorithmConfig:
        """The algorithm as trainer ranks run it: auto is resolved."""
        return replace(self.algorithm, old_logprobs=self.old_logprobs)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        self._check_rehearsal()
        self._check_backend()
        self._check_sizes()
        self._check_staleness()
        self._check_eval_sets()
        if self.rollout.load_rollouts or self.rollout.rollout_only:
            self._check_half_a_run()
        else:
            self._check_group_size()
        return self

    @property
    def eval_sets(self) -> list[EvalSetConfig]:
        """The sets of prompts to evaluate on. The first one chooses the best checkpoint."""
        sets = list(self.eval.sets)
        if self.data.eval_prompts:
            sets.insert(0, EvalSetConfig(name=HELD_OUT, prompts=self.data.eval_prompts))
        return sets

    @property
    def prompt_sources(self) -> list[DataConfig]:
        """How the prompts of each source are read and scored, those of evaluations included."""
        of_training = list(self.data.by_source().values())
        return of_training + [one.data(self.data) for one in self.eval_sets]

    def _check_rehearsal(self) -> None:
        if self.rehearsal.enabled and self.model.hf_checkpoint:
            raise ValueError(
                "rehearsal.enabled makes its own model; "
                f"model.hf_checkpoint={self.model.hf_checkpoint!r} needs --rehearsal.no-enabled"
            )

    def _check_backend(self) -> None:
        training = self.training
        replay = training.routing_replay
        if replay != "none" and training.backend != "megatron":
            raise ValueError(f"training.routing_replay={replay} needs training.backend=megatron")
        if replay == "R2" and self.old_logprobs != "recomputed":
            raise ValueError(
                "training.routing_replay=R2 needs algorithm.old_logprobs=recomputed, a pass to "
                "record; or set R3"
            )
        if training.backend == "fsdp":
            for name in MEGATRON_ONLY:
                if getattr(training, name):
                    raise ValueError(f"training.{name} needs training.backend=megatron")

    def _check_sizes(self) -> None:
        steps = self.training.num_steps_per_rollout
        prompts = self.rollout.rollout_batch_size
        if prompts % steps:
            raise ValueError(
                f"training.num_steps_per_rollout={steps} does not divide "
                f"rollout.rollout_batch_size={prompts}"
            )
        algorithm = self.algorithm
        if steps > 1 and algorithm.old_logprobs == "current":
            raise ValueError(
                f"training.num_steps_per_rollout={steps}: with algorithm.old_logprobs=current "
                "later steps would not know how far the policy has moved; choose auto, "
                "recomputed or rollout"
            )
        buffer = algorithm.overlong_buffer
        limit = self.rollout.max_new_tokens
        if buffer > limit:
            raise ValueError(
                f"algorithm.overlong_buffer={buffer} is above rollout.max_new_tokens={limit}"
            )

    def _check_staleness(self) -> None:
        if self.rollout.max_staleness and self.cluster.colocate:
            raise ValueError(
                f"rollout.max_staleness={self.rollout.max_staleness}: with cluster.colocate "
                "engines and trainer take turns, so that nothing overlaps; set 0, or give engines "
                "their own GPUs"
            )

    def _check_eval_sets(self) -> None:
        has_held_out = self.data.eval_prompts or self.rehearsal.enabled
        if has_held_out and HELD_OUT in {one.title for one in self.eval.sets}:
            raise ValueError(
                f"eval.sets: the name {HELD_OUT!r} is that of data.eval_prompts; choose another"
            )
        for one in self.eval.sets:
            one.data(self.data)  # raises ValueError where the reward lacks something

    def _check_group_size(self) -> None:
        """One sample of a prompt has no others to be compared with."""
        name = self.algorithm.name
        compares = name != "reinforce_plus_plus" and not isinstance(self.algorithm, CustomConfig)
        if self.rollout.n_samples_per_prompt == 1 and compares:
            raise ValueError(
                f"rollout.n_samples_per_prompt=1: {name} compares samples; set 2 or more"
            )

    def _check_half_a_run(self) -> None:
        """A replay has no engines and rollout-only has no trainer; refuse fields of
        what is not there."""
        if self.rollout.load_rollouts and self.rollout.rollout_only:
            raise ValueError(
                "rollout.load_rollouts and rollout.rollout_only exclude each other; set one"
            )
        mode = "rollout.load_rollouts" if self.rollout.load_rollouts else "rollout.rollout_only"
        transport = self.weight_sync.transport
        fields_without_use = {
            "weight_sync.transport": None if transport == "auto" else transport,
            "cluster.rollout_nodes": self.cluster.rollout_nodes,
            "cluster.engine_gpus": self.cluster.engine_gpus,
            "cluster.colocate": self.cluster.colocate or None,
        }
        if self.rollout.rollout_only:
            fields_without_use["training.num_gpus"] = self.training.num_gpus
        for field, value in fields_without_use.items():
            if value is not None:
                raise ValueError(f"{field}={value} makes no sense with {mode}; leave it out")
