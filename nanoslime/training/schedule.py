"""The learning rate, a pure function of the optimizer step: it needs no saved state."""

import math

from nanoslime.config.training import TrainingConfig


def lr_at(optimizer_step: int, *, config: TrainingConfig, total_steps: int) -> float:
    """The learning rate of `optimizer_step`, counted from 0.

    It rises to `lr` in lr_warmup_steps, then falls to `min_lr`, or stays where the
    schedule is constant. The first step after the warm-up has `lr`; step `total_steps`
    and all beyond have `min_lr`.
    """
    warmup_steps = config.lr_warmup_steps
    if optimizer_step < warmup_steps:
        return config.lr * (optimizer_step + 1) / warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    decay_steps = max(total_steps - warmup_steps, 1)
    done = min((optimizer_step - warmup_steps) / decay_steps, 1.0)
    if config.lr_schedule == "linear":
        left = 1 - done
    else:  # cosine
        left = (1 + math.cos(math.pi * done)) / 2
    return config.min_lr + (config.lr - config.min_lr) * left
