"""The sizes of a model, read from its config.json and never from flags."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from nanoslime.models import ARCHITECTURES
from nanoslime.plugins import resolve

if TYPE_CHECKING:
    from nanoslime.models.rules import Rule


class Architecture(NamedTuple):
    """What models/<architecture>.py provides."""

    read: Callable[[ConfigFile], ModelShape]
    rules: Callable[[ModelShape], list[Rule]]
    unconfirmed: str = ""  # which names rest on another project's code alone; the tools say it


@dataclass(frozen=True, slots=True, kw_only=True)
class MoE:
    """The experts of the layers that have them."""

    layers: tuple[
        int, ...
    ]  # which decoder layers; multi-token prediction layers count on from the last
    num_experts: int
    num_experts_per_token: int
    intermediate_size: int  # of one expert
    shared_intermediate_size: int = 0  # of the shared experts together; 0: none
    shared_gate: bool = False  # the shared experts' output is gated
    score: Literal["softmax", "sigmoid"] = "softmax"
    score_bias: bool = False  # a float32 bias that only the choice of experts sees
    normalized: bool = True  # the chosen scores are divided by their sum
    scaling_factor: float = 1.0
    num_groups: int = 1
    num_groups_per_token: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MLA:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    q_lora_rank: int | None  # None: queries are not compressed
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder's sizes and switches; equal shapes have equal tensors."""

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int  # of queries and keys
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    rms_norm_eps: float
    rope_theta: float
    rope_scaling_factor: float | None = (
        None  # of Llama 3.1's scaling (rope_type llama3); None: no scaling
    )
    rotary_fraction: float = 1.0  # of head_dim
    rotary_interleaved: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    moe: MoE | None = None
    mla: MLA | None = None
    num_mtp_layers: int = (
        0  # multi-token prediction layers that a checkpoint may hold beside num_layers
    )
    megatron_lacks: tuple[
        str, ...
    ] = ()  # what the Megatron backend cannot compute; it converts all the same

    @classmethod
    def read(cls, directory: Path | str) -> ModelShape:
        """The shape of the checkpoint in `directory`.

        Raises ValueError for a missing or broken config.json, a key that is missing, and an architecture or a
        setting of it that nanoslime does not have.
        """
        path = Path(directory) / "config.json"
        return cls.from_config(_read_object(path), path)

    @classmethod
    def from_config(cls, values: dict[str, Any], path: Path = Path("config.json")) -> ModelShape:
        """The shape that this content of a config.json describes; raises as `read` does."""
        file = ConfigFile(path, values)
        model_type = file["model_type"]
        if model_type not in ARCHITECTURES:
            known = ", ".join(sorted(ARCHITECTURES))
            raise ValueError(
                f"{path}: model_type={model_type!r} is not supported; known are {known}"
            )
        shape: ModelShape = resolve(model_type, ARCHITECTURES, "model_type").read(file)
        return replace(shape, megatron_lacks=(*shape.megatron_lacks, *_megatron_lacks(shape)))

    @property
    def architecture(self) -> Architecture:
        architecture: Architecture = resolve(self.model_type, ARCHITECTURES, "model_type")
        return architecture

    @property
    def num_layer_parameters(self) -> int:
        """Parameters of one decoder layer; the mean where layers differ."""
        embeddings = self.num_embedding_parameters * (1 if self.tie_word_embeddings else 2)
        return (self.num_parameters - embeddings - self.hidden_size) // self.num_layers

    @property
    def num_embedding_parameters(self) -> int:
        """Parameters of the input embedding; the output layer has as many again, unless tied to it."""
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """All of them, without multi-token prediction; tied embeddings count once."""
        return sum(rule.num_elements(self) for rule in self.architecture.rules(self))

    @property
    def attention_parity_tokens(self) -> float:
        """Length at which causal attention costs a sequence as many FLOPs as its products with weights."""
        active = self.num_parameters - (
            0 if self.tie_word_embeddings else self.num_embedding_parameters
        )
        if moe := self.moe:
            layers = sum(layer < self.num_layers for layer in moe.layers)
            idle = layers * (moe.num_experts - moe.num_experts_per_token)
            active -= idle * 3 * self.hidden_size * moe.intermediate_size
        mla = self.mla
        dims = (
            mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim
            if mla
            else 2 * self.head_dim
        )
        return 2 * active / (self.num_layers * self.num_attention_heads * dims)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The decoder layers that have experts; without those of multi-token prediction."""
        return (
            tuple(layer for layer in self.moe.layers if layer < self.num_layers) if self.moe else ()
        )

    @property
    def num_expert_parameters(self) -> int:
        """Parameters of the experts that tokens choose from, of all layers."""
        return sum(
            rule.num_elements(self) for rule in self.architecture.rules(self) if rule.num_experts
        )


def _megatron_lacks(shape: ModelShape) -> list[str]:
    """What megatron-core 0.16.1 computes in one way only, where transformers has several."""
    found, moe = [], shape.moe
    if shape.mla and not shape.rotary_interleaved:
        found.append("rope_interleave=false")
    if moe and moe.score == "sigmoid" and moe.normalized != (moe.num_experts_per_token > 1):
        found.append(
            f"norm_topk_prob={moe.normalized} with {moe.num_experts_per_token} sigmoid scores"
        )
    if moe and moe.num_groups > 1 and moe.num_experts_per_token // moe.num_groups_per_token != 2:
        found.append(
            "groups of experts ranked by two scores, with other than two experts of each group"
        )
    return found


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError as e:
        raise ValueError(
            f"{path} does not exist; a Hugging Face checkpoint directory has one"
        ) from e
    except (OSError, ValueError) as e:
        raise ValueError(f"{path} cannot be read as JSON: {e}") from e
    if not isinstance(values, dict):
        raise ValueError(f"{path} should hold one JSON object, not {type(values).__name__}")
    return values


class ConfigFile:
    """A config.json whose errors name the file."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path, self._values = path, values

    def __getitem__(self, key: str) -> Any:
        if self._values.get(key) is None:
            raise ValueError(f"{self.path} has no {key}, which the model's shape needs")
        return self._values[key]

    def get(self, key: str, default: Any) -> Any:
        return default if (value := self._values.get(key)) is None else value

    def refuse(self, key: str, allowed: Any) -> None:
        """Raises ValueError where `key` is present with another value than `allowed`."""
        if self.get(key, allowed) != allowed:
            raise ValueError(
                f"{self.path}: {key}={self._values[key]!r} is not supported, only {allowed!r}"
            )

    def sizes(self, rotary_fraction: float = 1.0) -> dict[str, Any]:
        """The fields of ModelShape that every decoder spells alike; rotary_fraction: where no key has it."""
        self.refuse("hidden_act", "silu")
        if self.get("quantization_config", None):
            method = self["quantization_config"].get("quant_method")
            raise ValueError(
                f"{self.path}: {method} weights are not supported; dequantize them first"
            )
        heads = self["num_attention_heads"]
        own = (
            "model_type",
            "hidden_size",
            "intermediate_size",
            "vocab_size",
            "max_position_embeddings",
        )
        return {name: self[name] for name in (*own, "num_attention_heads", "rms_norm_eps")} | {
            "num_layers": self["num_hidden_layers"],
            "num_key_value_heads": self.get("num_key_value_heads", heads),
            "head_dim": self.get("head_dim", self["hidden_size"] // heads),
            "tie_word_embeddings": self.get("tie_word_embeddings", False),
            **self._rope(rotary_fraction),
        }

    def sparse_layers(self) -> tuple[int, ...]:
        """The layers with experts: every decoder_sparse_step-th, mlp_only_layers aside (Qwen)."""
        step, dense = self.get("decoder_sparse_step", 1), self.get("mlp_only_layers", [])
        return tuple(
            i for i in range(self["num_hidden_layers"]) if (i + 1) % step == 0 and i not in dense
        )

    def sigmoid_moe(self) -> MoE:
        """Experts as DeepSeek-V3 and GLM-4.5 spell them: dense layers first, shared experts, a score bias."""
        size = self["moe_intermediate_size"]
        num_layers = self["num_hidden_layers"] + self.get("num_nextn_predict_layers", 0)
        return MoE(
            layers=tuple(range(self.get("first_k_dense_replace", 0), num_layers)),
            num_experts=self["n_routed_experts"],
            num_experts_per_token=self["num_experts_per_tok"],
            intermediate_size=size,
            shared_intermediate_size=size * self.get("n_shared_experts", 0),
            score="sigmoid",
            score_bias=True,
            normalized=self.get("norm_topk_prob", True),
            scaling_factor=self.get("routed_scaling_factor", 1.0),
            num_groups=self.get("n_group", 1),
            num_groups_per_token=self.get("topk_group", 1),
        )

    def _rope(self, fraction: float) -> dict[str, Any]:
        """The rotary fields: from `rope_parameters` of transformers 5, or the flat keys before it."""
        rope = self.get("rope_parameters", None) or self.get("rope_scaling", None) or {}
        fraction = rope.get("partial_rotary_factor") or self.get("partial_rotary_factor", fraction)
        theta = float(
            rope.get("rope_theta") or self.get("rope_theta", 10000.0)
        )  # Llama 2 leaves it out
        fields = {"rope_theta": theta, "rotary_fraction": fraction}
        kind = rope.get("rope_type", rope.get("type", "default"))
        fixed = {
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        lacks = []
        if kind == "llama3" and all(rope.get(key) == value for key, value in fixed.items()):
            fields["rope_scaling_factor"] = float(rope["factor"])
        elif kind != "default":
            lacks.append(f"rope scaling {rope} (only default, or llama3 with {fixed})")
        window = self.get("sliding_window", 0)
        if window and self.get("use_sliding_window", self["model_type"] in ("mistral", "mixtral")):
            lacks.append(f"sliding_window={window}")
        return fields | {"megatron_lacks": tuple(lacks)}
