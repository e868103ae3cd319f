"""The sizes of a model, read from its config.json and never from flags."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nanoslime.models import ARCHITECTURES
from nanoslime.plugins import resolve

if TYPE_CHECKING:
    from nanoslime.models.rules import Rule


class Architecture(NamedTuple):
    """What models/<architecture>.py provides."""

    read: Callable[[ConfigFile], ModelShape]
    rules: Callable[[ModelShape], list[Rule]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder's sizes and switches; equal shapes have equal tensors."""

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    rms_norm_eps: float
    rope_theta: float
    rope_scaling_factor: float | None = None  # of Llama 3.1's scaling (rope_type llama3); None: no scaling
    qkv_bias: bool = False
    qk_norm: bool = False

    @classmethod
    def read(cls, directory: Path | str) -> ModelShape:
        """The shape of the checkpoint in `directory`.

        Raises ValueError for a missing or broken config.json, a key that is missing, and an architecture or a
        setting of it that nanoslime does not have.
        """
        return cls._of(ConfigFile.open(Path(directory) / "config.json"))

    @classmethod
    def from_config(cls, values: dict[str, Any]) -> ModelShape:
        """The shape that this content of a config.json describes; raises as `read` does."""
        return cls._of(ConfigFile(Path("config.json"), values))

    @classmethod
    def _of(cls, file: ConfigFile) -> ModelShape:
        model_type = file["model_type"]
        if model_type not in ARCHITECTURES:
            known = ", ".join(sorted(ARCHITECTURES))
            raise ValueError(f"{file.path}: model_type={model_type!r} is not supported; known are {known}")
        shape: ModelShape = resolve(model_type, ARCHITECTURES, "model_type").read(file)
        return shape

    @property
    def architecture(self) -> Architecture:
        architecture: Architecture = resolve(self.model_type, ARCHITECTURES, "model_type")
        return architecture

    @property
    def num_layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        heads, groups = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        attention = self.hidden_size * (2 * heads + 2 * groups)
        biases = heads + 2 * groups if self.qkv_bias else 0
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        return attention + biases + norms + 3 * self.hidden_size * self.intermediate_size

    @property
    def num_embedding_parameters(self) -> int:
        """Parameters of the input embedding; the output layer has as many again, unless tied to it."""
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """All of them; tied embeddings count once."""
        embeddings = self.num_embedding_parameters * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_layers * self.num_layer_parameters + self.hidden_size

    def rank_parameters(self, tp_size: int, pp_size: int) -> int:
        """Parameters of the fullest rank, for memory estimates: an end of the pipeline, or all of it."""
        ends = 2 if pp_size == 1 and not self.tie_word_embeddings else 1
        layers = -(-self.num_layers // pp_size) * self.num_layer_parameters
        return -(-(layers + ends * self.num_embedding_parameters) // tp_size)

    def training_bytes(self, tp_size: int, pp_size: int, dp_size: int, *, distributed_optimizer: bool) -> int:
        """Weights (2 bytes), float32 gradients (4), main parameters and two moments (12) of the fullest rank.

        Activations are not in it. The distributed optimizer spreads the 12 over data parallelism.
        """
        optimizer = 12 / dp_size if distributed_optimizer else 12
        return int(self.rank_parameters(tp_size, pp_size) * (6 + optimizer))


class ConfigFile:
    """A config.json whose errors name the file."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self._values = values

    @classmethod
    def open(cls, path: Path) -> ConfigFile:
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError as e:
            raise ValueError(f"{path} does not exist; a Hugging Face checkpoint directory has one") from e
        except (OSError, ValueError) as e:
            raise ValueError(f"{path} cannot be read as JSON: {e}") from e
        if not isinstance(values, dict):
            raise ValueError(f"{path} should hold one JSON object, not {type(values).__name__}")
        return cls(path, values)

    def __getitem__(self, key: str) -> Any:
        if self._values.get(key) is None:
            raise ValueError(f"{self.path} has no {key}, which the model's shape needs")
        return self._values[key]

    def get(self, key: str, default: Any) -> Any:
        value = self._values.get(key)
        return default if value is None else value

    def refuse(self, key: str, allowed: Any) -> None:
        """Raises ValueError where `key` is present with another value than `allowed`."""
        if self.get(key, allowed) != allowed:
            raise ValueError(f"{self.path}: {key}={self._values[key]!r} is not supported, only {allowed!r}")

    def sizes(self) -> dict[str, Any]:
        """The fields of ModelShape that every dense decoder spells alike."""
        self.refuse("hidden_act", "silu")
        heads = self["num_attention_heads"]
        theta, scaling_factor = self._rope()
        return {
            "model_type": self["model_type"],
            "num_layers": self["num_hidden_layers"],
            "hidden_size": self["hidden_size"],
            "intermediate_size": self["intermediate_size"],
            "num_attention_heads": heads,
            "num_key_value_heads": self.get("num_key_value_heads", heads),
            "head_dim": self.get("head_dim", self["hidden_size"] // heads),
            "vocab_size": self["vocab_size"],
            "max_position_embeddings": self["max_position_embeddings"],
            "tie_word_embeddings": self.get("tie_word_embeddings", False),
            "rms_norm_eps": self["rms_norm_eps"],
            "rope_theta": theta,
            "rope_scaling_factor": scaling_factor,
        }

    def _rope(self) -> tuple[float, float | None]:
        """(theta, llama3 scaling factor): `rope_parameters` of transformers 5, or the flat keys before it."""
        rope = self.get("rope_parameters", None) or self.get("rope_scaling", None) or {}
        theta = float(rope.get("rope_theta") or self.get("rope_theta", 10000.0))  # Llama 2 leaves it out
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "default":
            return theta, None
        fixed = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        if kind == "llama3" and all(rope.get(key) == value for key, value in fixed.items()):
            return theta, float(rope["factor"])
        raise ValueError(
            f"{self.path}: rope scaling {rope} is not supported, only default or llama3 with {fixed}"
        )
