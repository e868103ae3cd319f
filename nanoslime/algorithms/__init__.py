"""The algorithms: maths on samples and tensors. No I/O, no process groups, no framework."""

from nanoslime.algorithms.grpo import GRPO
from nanoslime.config.algorithm import AlgorithmConfig
from nanoslime.plugins import resolve

ALGORITHMS = {"grpo": "nanoslime.algorithms.grpo:GRPO"}


def make(config: AlgorithmConfig) -> GRPO:
    """The algorithm of `config.name`; it satisfies nanoslime.training.backend.Algorithm."""
    return resolve(config.name, ALGORITHMS, "algorithm.name")(config)
