"""The algorithms: maths on samples and tensors. No I/O, no process groups, no framework."""

from nanoslime.algorithms.policy_gradient import PolicyGradient
from nanoslime.config.algorithm import AlgorithmConfig
from nanoslime.plugins import resolve
from nanoslime.types import RunError

ALGORITHMS = {
    "grpo": "nanoslime.algorithms.grpo:GRPO",
    "gspo": "nanoslime.algorithms.gspo:GSPO",
    "cispo": "nanoslime.algorithms.cispo:CISPO",
    "rloo": "nanoslime.algorithms.reinforce:RLOO",
    "reinforce_plus_plus": "nanoslime.algorithms.reinforce:ReinforcePP",
    "reinforce_plus_plus_baseline": "nanoslime.algorithms.reinforce:ReinforcePPBaseline",
}


def make(config: AlgorithmConfig, max_response_length: int = 0) -> PolicyGradient:
    """Makes the algorithm of `config.name`.

    Raises RunError where that cannot be loaded or is no PolicyGradient.
    """
    algorithm = resolve(config.name, ALGORITHMS, "algorithm.name")
    if not isinstance(algorithm, type) or not issubclass(algorithm, PolicyGradient):
        raise RunError(
            f"algorithm.name={config.name!r} is no algorithm; "
            "name a subclass of nanoslime.algorithms.PolicyGradient"
        )
    return algorithm(config, max_response_length)
