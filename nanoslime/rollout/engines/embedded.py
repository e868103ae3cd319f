"""The kind `embedded`: transformers in the driver's process, for machines without
SGLang and for tests. Its model is in embedded_model.py."""

from nanoslime.config import RolloutConfig, RunConfig
from nanoslime.engine_kind import EngineKind
from nanoslime.models.shape import ModelShape


class Embedded(EngineKind):
    name = "embedded"
    title = "embedded"
    takes_slots = False
    honours_seeds = True
    transports = ("in_process", "disk")
    owner = "nanoslime.rollout.engines.embedded_model:EmbeddedOwner"

    def check_options(self, rollout: RolloutConfig) -> None:
        """It has no options of its own."""

    def check_plan(self, rollout: RolloutConfig, shape: ModelShape, slots_per_node: int) -> None:
        """It serves every model that transformers can load."""

    def memory_fraction(self, config: RunConfig) -> float:
        """It has no GPU of its own."""
        return 0.0
