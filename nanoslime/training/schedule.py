"""The learning rate of an optimizer step, a pure function: a resumed run needs the step's number only."""

import math

from nanoslime.config.training import TrainingConfig


def lr_at(step: int, *, config: TrainingConfig, total_steps: int) -> float:
    """The rate of optimizer step `step`, from 0: up to `lr` in lr_warmup_steps, then down to `min_lr`.

    The first step after the warm-up has `lr`, `total_steps` and all beyond have `min_lr`; a constant stays.
    """
    if step < config.lr_warmup_steps:
        return config.lr * (step + 1) / config.lr_warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    done = min((step - config.lr_warmup_steps) / max(total_steps - config.lr_warmup_steps, 1), 1.0)
    left = 1 - done if config.lr_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.min_lr + (config.lr - config.min_lr) * left
