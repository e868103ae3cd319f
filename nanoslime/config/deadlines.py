"""How long the trainer ranks may take for what they are asked to do.

A collective has the shortest deadline, so that a rank which waits for another one says so
itself. The driver's own deadlines are for ranks that hang without a collective: they are
generous, and the plan derives them from the work unless the configuration sets them.
"""

from dataclasses import dataclass

from nanoslime.config.run import RunConfig

# What the slowest rank worth waiting for does in a second: 1% of a GPU's arithmetic, or a
# thousandth of a CPU's, and its share of a slow filesystem.
_FLOPS = {"cuda": 1e13, "cpu": 1e9}
_BYTES_PER_S = 20e6
_FLOOR_S = 1800.0
# Weight, main parameter and two moments.
_BYTES_PER_PARAMETER = 16


@dataclass(frozen=True, slots=True)
class Deadline:
    seconds: float
    setting: str

    def __str__(self) -> str:
        return f"{self.setting}={self.seconds:g}"


@dataclass(frozen=True, slots=True)
class Deadlines:
    start: Deadline
    train: Deadline  # of all passes and steps of a rollout
    save: Deadline  # of a save, a load, an export and every other call


def derive_deadlines(config: RunConfig, num_parameters: int, num_ranks: int) -> Deadlines:
    """Those of a model of `num_parameters` on `num_ranks` trainer ranks."""
    training = config.training
    flops = _rollout_flops(config, num_parameters)
    compute_s = flops / (num_ranks * _FLOPS[config.cluster.device])
    write_s = _BYTES_PER_PARAMETER * num_parameters / (num_ranks * _BYTES_PER_S)
    derived_train_s = training.collective_deadline_s + max(_FLOOR_S, compute_s)
    derived_save_s = training.collective_deadline_s + max(_FLOOR_S, write_s)
    train_s = training.train_deadline_s or derived_train_s
    save_s = training.save_deadline_s or derived_save_s
    return Deadlines(
        start=Deadline(training.start_deadline_s, "training.start_deadline_s"),
        train=Deadline(train_s, "training.train_deadline_s"),
        save=Deadline(save_s, "training.save_deadline_s"),
    )


def _rollout_flops(config: RunConfig, num_parameters: int) -> float:
    """Of a rollout with the longest prompts and answers, without attention scores.

    A forward pass takes 2 a parameter and token, a training step three times that.
    """
    rollout = config.rollout
    tokens_per_sample = config.data.max_prompt_tokens + rollout.max_new_tokens
    num_samples = rollout.rollout_batch_size * rollout.n_samples_per_prompt
    num_passes = 3 + 1 + 1  # a step, the old and the reference's logprobs
    return 2.0 * num_parameters * num_samples * tokens_per_sample * num_passes
