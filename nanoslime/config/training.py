"""Trainer knobs: backend, parallel sizes, optimizer, micro-batches, checkpoints."""

import re
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from nanoslime.config.base import knobs

# Fields of TrainingConfig.
PARALLEL_SIZES = ("tp_size", "pp_size", "vpp_size", "cp_size", "ep_size", "etp_size")
MEGATRON_OPTIONS = ("megatron", "megatron_ddp", "megatron_optimizer")
MEGATRON_ONLY = (
    "sequence_parallel",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    *MEGATRON_OPTIONS,
)


def _check_frozen_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as e:
        raise ValueError(f"training.freeze: {pattern!r} is not a regular expression: {e}") from e
    return pattern


FrozenPattern = Annotated[str, AfterValidator(_check_frozen_pattern)]


@knobs
class TrainingConfig:
    backend: Literal["megatron", "fsdp"] = "megatron"
    """megatron: all parallel sizes, on any number of nodes. fsdp: FSDP2, which is what one node
    gets where nothing asks for Megatron."""
    num_gpus: int | None = Field(default=None, ge=1)
    """Trainer ranks of `python -m nanoslime.train`; a submitted job derives them from
    its nodes."""
    tp_size: int = Field(default=1, ge=1)
    """Tensor parallel size: GPUs of one node that share each layer's matrices."""
    pp_size: int = Field(default=1, ge=1)
    """Pipeline parallel size: stages that the layers are cut into."""
    cp_size: int = Field(default=1, ge=1)
    """Ranks that share each sequence; a micro-batch then holds cp_size times the token
    budget."""
    ep_size: int = Field(default=1, ge=1)
    """Expert parallel size: ranks that share the experts of an MoE model."""
    etp_size: int = Field(default=1, ge=1)
    """Tensor parallel size within an expert."""
    vpp_size: int = Field(default=1, ge=1)
    """Chunks of the model on each pipeline rank; above 1 the schedule is interleaved
    (arXiv 2104.04473)."""
    num_layers_in_first_pipeline_stage: int | None = Field(default=None, ge=1)
    """Layers of the first pipeline rank, over all its chunks. Left out, the ranks have
    equally many or one more, and the first and the last rather fewer."""
    num_layers_in_last_pipeline_stage: int | None = Field(default=None, ge=1)
    """Layers of the last pipeline rank, over all its chunks."""
    sequence_parallel: bool = False
    """Spread norms and residuals over the ranks of tp_size, which saves activations; models with
    experts need it where tp_size is above 1."""
    allow_slow: bool = False
    """Allow context parallelism and experts on GPUs without Transformer Engine, which
    is slow."""
    lr: float = Field(default=1e-6, ge=0)
    """Learning rate of Adam."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes from lr to min_lr after the warm-up."""
    lr_warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps in which the learning rate rises from 0 to lr."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of a linear or cosine schedule."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of Adam's mean of gradients."""
    adam_beta2: float = Field(default=0.98, ge=0, lt=1)
    """Decay of Adam's mean of squared gradients."""
    adam_eps: float = Field(default=1e-8, gt=0)
    """What Adam adds to the denominator of a step."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay, times the learning rate."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Global gradient norm; 0: no clipping."""
    skip_grad_norm_above: float | None = Field(default=None, gt=1)
    """Skip an optimizer step whose gradient norm is above so many times the median of
    the norms of the last 128 steps that were made, once there are 16. The run directory
    keeps the batch of a skipped step, under skipped/. After 8 skipped in a row these
    norms are forgotten and the next step is made; a step whose norm is not finite is
    always skipped."""
    num_steps_per_rollout: int = Field(default=1, ge=1)
    """Optimizer steps per rollout, each over its share of the groups."""
    max_tokens_per_microbatch: int = Field(default=8192, ge=1)
    """Token budget of a packed micro-batch, per rank of cp_size; a longer sequence goes
    alone."""
    recompute: bool = False
    """Keep only each layer's input and compute the rest again in the backward pass, for less memory
    and about a third more work."""
    routing_replay: Literal["none", "R2", "R3"] = "none"
    """The training pass of an MoE model takes the experts that the pass for old
    logprobs chose (R2, arXiv 2507.18071 section 5.3) or that the engine ran (R3, arXiv
    2510.11370)."""
    freeze: list[FrozenPattern] = Field(default_factory=list)
    """Tensors that are not trained: regular expressions, found anywhere in a tensor's
    Hugging Face name."""
    optimizer_offload: bool = False
    """Adam's state and step on the CPU; with fsdp, the weights between uses too."""
    distributed_optimizer: bool = True
    """Spread Adam's state over the data parallel ranks of Megatron."""
    megatron: dict[str, Any] = Field(default_factory=dict)
    """Fields of megatron-core's TransformerConfig as written there."""
    megatron_ddp: dict[str, Any] = Field(default_factory=dict)
    """Fields of megatron-core's DistributedDataParallelConfig, such as
    overlap_grad_reduce and bucket_size."""
    megatron_optimizer: dict[str, Any] = Field(default_factory=dict)
    """Fields of megatron-core's OptimizerConfig, such as use_precision_aware_optimizer
    and exp_avg_dtype (as text: bfloat16)."""
    collective_deadline_s: float = Field(default=600.0, gt=0)
    """How long a rank waits for another one in a collective."""
    train_deadline_s: float | None = Field(default=None, gt=0)
    """Deadline of the whole training on a rollout, all passes and steps. By default the
    plan derives it: half an hour, or as long as 1% of the GPUs' arithmetic takes."""
    save_deadline_s: float | None = Field(default=None, gt=0)
    """Deadline of a save, a load or an export. By default the plan derives it: half an
    hour, or as long as 20 MB a second and rank take."""
    start_deadline_s: float = Field(default=600.0, gt=0)
    """How long trainer ranks wait for one another at the start."""

    def without_megatron(self) -> Self:
        """The same without parallel sizes and what else only Megatron has."""
        unset = type(self)()
        left_out = {name: getattr(unset, name) for name in PARALLEL_SIZES + MEGATRON_ONLY}
        return replace(self, **left_out)

    @model_validator(mode="after")
    def _collectives_end_first(self) -> Self:
        """Only a rank that waits in a collective can say that another one is late."""
        for field in ("train_deadline_s", "save_deadline_s"):
            deadline_s = getattr(self, field)
            if deadline_s is not None and deadline_s <= self.collective_deadline_s:
                raise ValueError(
                    f"training.{field}={deadline_s:g} must be above "
                    f"training.collective_deadline_s={self.collective_deadline_s:g}; raise it, or "
                    "lower that one"
                )
        return self

    @model_validator(mode="after")
    def _lr_falls(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(
                f"training.min_lr={self.min_lr:g} is above training.lr={self.lr:g}, from which "
                "the learning rate falls to it; lower it"
            )
        return self


@knobs
class CheckpointConfig:
    interval: int = Field(default=0, ge=0)
    """Commit a checkpoint after every so many rollouts; 0: only at the end and when the
    job must stop."""
    every_min: float = Field(default=0.0, ge=0)
    """Commit a checkpoint also after a rollout at whose end so many minutes have passed
    since the last commit, or the start; 0: none for that reason."""
    keep_last: int = Field(default=2, ge=1)
    """Keep so many of the newest checkpoints."""
    keep_every: int = Field(default=0, ge=0)
    """Keep the checkpoints whose step is a multiple of this for good; 0: none."""
    keep_best: bool = False
    """Keep the checkpoint with the best evaluation reward."""
    export_hf: bool = True
    """Write a Hugging Face checkpoint at the end."""

    def due(self, step: int, num_rollout: int, since_commit_s: float = 0.0) -> bool:
        """Whether a checkpoint is committed after this step; after the last one it always is."""
        done = step + 1
        if done == num_rollout:
            return True
        if 0 < self.every_min * 60 <= since_commit_s:
            return True
        return self.interval > 0 and done % self.interval == 0


@knobs
class TrackingConfig:
    use_tensorboard: bool = True
    """Write metrics for TensorBoard, into the run's directory."""
    use_wandb: bool = False
    """Write metrics for Weights & Biases."""
    wandb_project: str = "nanoslime"
    """The project of Weights & Biases that the run belongs to."""
    wandb_mode: Literal["offline", "online"] = "offline"
    """offline: metrics are uploaded later, by `runs.py sync`."""
