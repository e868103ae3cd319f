"""The kind `embedded`: transformers in the driver's process, for machines without
SGLang and for tests. Its model is in embedded_model.py."""

from nanoslime.engine_kind import EngineKind


class Embedded(EngineKind):
    """It has no options of its own, no GPU, and serves every model that transformers can load."""

    name = "embedded"
    title = "embedded"
    takes_slots = False
    honours_seeds = True
    transports = ("in_process", "disk")
    owner = "nanoslime.rollout.engines.embedded_model:EmbeddedOwner"
