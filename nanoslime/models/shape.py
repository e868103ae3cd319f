"""The sizes of a model, read from its config.json and never from flags."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from nanoslime.models import ARCHITECTURES
from nanoslime.plugins import resolve
from nanoslime.storage.json_file import read_object
from nanoslime.types import RunError

if TYPE_CHECKING:
    from nanoslime.models.rules import Rule

# The only parameters of Llama 3.1's rotary scaling that megatron-core computes with.
_LLAMA3_SCALING = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


# Fields of ModelShape that every config.json has under the same name.
_SAME_NAMES = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
)


class Architecture(NamedTuple):
    """What models/<architecture>.py provides."""

    read: Callable[[ConfigFile], ModelShape]
    rules: Callable[[ModelShape], list[Rule]]
    # Says which Megatron names rest on another project's code alone; the tools print it.
    unconfirmed: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoE:
    """The experts of the layers that have them."""

    # These are decoder layers; multi-token prediction layers count on from the last.
    layers: tuple[int, ...]
    num_experts: int
    num_experts_per_token: int
    # Size of one expert.
    intermediate_size: int
    # Size of the shared experts together; 0: there are none.
    shared_intermediate_size: int = 0
    # Whether the shared experts' output is gated.
    shared_gate: bool = False
    score: Literal["softmax", "sigmoid"] = "softmax"
    # Whether there is a float32 bias that only the choice of experts sees.
    score_bias: bool = False
    # Whether the chosen scores are divided by their sum.
    normalized: bool = True
    scaling_factor: float = 1.0
    num_groups: int = 1
    num_groups_per_token: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MLA:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    # None: queries are not compressed.
    q_lora_rank: int | None
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
    # Size of a head's queries and keys.
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    rms_norm_eps: float
    rope_theta: float
    # Factor of Llama 3.1's scaling (rope_type llama3); None: no scaling.
    rope_scaling_factor: float | None = None
    # Tokens to which another scaling stretches max_position_embeddings; None: it does not.
    scaled_context_length: int | None = None
    # The share of head_dim that is rotated.
    rotary_fraction: float = 1.0
    rotary_interleaved: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    moe: MoE | None = None
    mla: MLA | None = None
    # Multi-token prediction layers that a checkpoint may hold beside num_layers.
    num_mtp_layers: int = 0
    # What the Megatron backend cannot compute; the model converts all the same.
    megatron_lacks: tuple[str, ...] = ()

    @classmethod
    def read(cls, directory: Path | str) -> ModelShape:
        """The shape of the checkpoint in `directory`.

        Raises RunError for a missing or broken config.json, a key that is missing,
        and an architecture or a setting of it that nanoslime does not have.
        """
        path = Path(directory) / "config.json"
        if not path.is_file():
            raise RunError(f"{path} does not exist; a Hugging Face checkpoint directory has one")
        return cls.from_config(read_object(path), path)

    @classmethod
    def from_config(cls, values: dict[str, Any], path: Path = Path("config.json")) -> ModelShape:
        """The shape that this content of a config.json describes; raises as `read` does."""
        file = ConfigFile(path, values)
        model_type = file["model_type"]
        if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
            raise RunError(
                f"{path}: model_type={model_type!r} is not supported; "
                f"known are {', '.join(sorted(ARCHITECTURES))}"
            )
        try:
            shape = _architecture(model_type).read(file)
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise RunError(f"{path}: a value in it is of no {model_type}: {error}") from error
        for field in fields(shape):
            value = getattr(shape, field.name)
            if field.type == "int" and type(value) is not int:
                raise RunError(f"{path}: {field.name}={value!r} is no whole number")
        lacks = (*shape.megatron_lacks, *_megatron_lacks(shape))
        return replace(shape, megatron_lacks=lacks)

    @property
    def architecture(self) -> Architecture:
        return _architecture(self.model_type)

    @property
    def context_length(self) -> int:
        """Tokens that the model reads at most, prompt and response together."""
        return max(self.max_position_embeddings, self.scaled_context_length or 0)

    @property
    def num_parameters(self) -> int:
        """All parameters, without multi-token prediction; tied embeddings count once."""
        return sum(rule.num_elements(self) for rule in self.architecture.rules(self))

    @property
    def num_expert_parameters(self) -> int:
        """Parameters of the experts that tokens choose from, of all layers."""
        rules = [rule for rule in self.architecture.rules(self) if rule.num_experts]
        return sum(rule.num_elements(self) for rule in rules)

    @property
    def num_embedding_parameters(self) -> int:
        """Parameters of the input embedding; the output layer has as many again, unless
        tied to it."""
        return self.vocab_size * self.hidden_size

    @property
    def num_layer_parameters(self) -> int:
        """Parameters of one decoder layer; the mean where layers differ."""
        num_embeddings = 1 if self.tie_word_embeddings else 2
        embeddings = num_embeddings * self.num_embedding_parameters
        final_norm = self.hidden_size
        return (self.num_parameters - embeddings - final_norm) // self.num_layers

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The decoder layers that have experts, without multi-token prediction layers."""
        if self.moe is None:
            return ()
        return tuple(layer for layer in self.moe.layers if layer < self.num_layers)

    @property
    def attention_parity_tokens(self) -> float:
        """Length at which causal attention costs a sequence as many FLOPs as its
        products with weights."""
        active = self.num_parameters
        if not self.tie_word_embeddings:
            # The input embedding is looked up and not multiplied with.
            active -= self.num_embedding_parameters
        moe = self.moe
        if moe:
            idle_experts = moe.num_experts - moe.num_experts_per_token
            expert = 3 * self.hidden_size * moe.intermediate_size
            active -= len(self.moe_layers) * idle_experts * expert
        mla = self.mla
        if mla:
            head_dims = mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim
        else:
            head_dims = 2 * self.head_dim
        return 2 * active / (self.num_layers * self.num_attention_heads * head_dims)


def _architecture(model_type: str) -> Architecture:
    architecture: Architecture = resolve(model_type, ARCHITECTURES, "model_type")
    return architecture


def _megatron_lacks(shape: ModelShape) -> list[str]:
    """What megatron-core 0.19.2 computes in one way only, where transformers has several."""
    found = []
    if shape.mla and not shape.rotary_interleaved:
        found.append("rope_interleave=false")
    moe = shape.moe
    if moe is None:
        return found
    several = moe.num_experts_per_token > 1
    if moe.score == "sigmoid" and moe.normalized != several:
        found.append(
            f"norm_topk_prob={moe.normalized} with {moe.num_experts_per_token} sigmoid scores"
        )
    if moe.num_groups > 1 and moe.num_experts_per_token // moe.num_groups_per_token != 2:
        found.append(
            "groups of experts ranked by two scores, with other than two experts of each group"
        )
    return found


class ConfigFile:
    """A config.json whose errors name the file."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self._values = values

    def __getitem__(self, key: str) -> Any:
        """The value of `key`. Raises RunError where it is missing or null."""
        value = self._values.get(key)
        if value is None:
            raise RunError(f"{self.path} has no {key}, which the model's shape needs")
        return value

    def get(self, key: str, default: Any) -> Any:
        """The value of `key`, or `default` where it is missing or null."""
        value = self._values.get(key)
        return default if value is None else value

    def _whole(self, key: str) -> int:
        """The whole number that `key` holds; RunError where it holds something else."""
        value = self[key]
        if type(value) is not int:
            raise RunError(f"{self.path}: {key}={value!r} is no whole number")
        return value

    def refuse(self, key: str, allowed: Any) -> None:
        """Raises RunError where `key` is present with another value than `allowed`."""
        value = self.get(key, allowed)
        if value != allowed:
            raise RunError(f"{self.path}: {key}={value!r} is not supported, only {allowed!r}")

    def sizes(self, rotary_fraction: float = 1.0) -> dict[str, Any]:
        """The fields of ModelShape that every decoder spells alike.

        `rotary_fraction` is taken where no key holds it.
        """
        self.refuse("hidden_act", "silu")
        quantization = self.get("quantization_config", None)
        if quantization:
            raise RunError(
                f"{self.path}: {quantization.get('quant_method')} weights are not supported; "
                "dequantize them first"
            )
        heads = self._whole("num_attention_heads")
        return {
            **{name: self[name] for name in _SAME_NAMES},
            "num_layers": self["num_hidden_layers"],
            "num_key_value_heads": self.get("num_key_value_heads", heads),
            "head_dim": self.get("head_dim", self._whole("hidden_size") // heads),
            "tie_word_embeddings": self.get("tie_word_embeddings", False),
            **self._rotary_fields(rotary_fraction),
        }

    def softmax_moe(self, **others: Any) -> MoE:
        """Experts as Qwen spells them, in every decoder_sparse_step-th layer, mlp_only_layers
        aside; `others` are further fields."""
        step = self.get("decoder_sparse_step", 1)
        dense = self.get("mlp_only_layers", [])
        layers = range(self["num_hidden_layers"])
        return MoE(
            layers=tuple(n for n in layers if (n + 1) % step == 0 and n not in dense),
            num_experts=self.get("num_experts", None) or self["num_local_experts"],
            num_experts_per_token=self["num_experts_per_tok"],
            normalized=self.get("norm_topk_prob", False),
            intermediate_size=self["moe_intermediate_size"],
            **others,
        )

    def sigmoid_moe(self) -> MoE:
        """Experts as DeepSeek-V3 and GLM-4.5 spell them: dense layers first, shared
        experts, a score bias."""
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

    def _rotary_fields(self, rotary_fraction: float) -> dict[str, Any]:
        """Fields from `rope_parameters` of transformers 5, or from the flat keys before it."""
        rope = self.get("rope_parameters", None) or self.get("rope_scaling", None) or {}
        theta = rope.get("rope_theta")
        if theta is None:
            # Llama 2 leaves it out.
            theta = self.get("rope_theta", 10000.0)
        fraction = rope.get("partial_rotary_factor")
        if fraction is None:
            fraction = self.get("partial_rotary_factor", rotary_fraction)
        scaling_factor = None
        scaled_length = None
        lacks = []
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "llama3" and _LLAMA3_SCALING.items() <= rope.items():
            scaling_factor = float(rope["factor"])
        elif kind != "default":
            # A config may hold the length before or after the scaling; without the
            # original one SGLang takes it for the length before.
            original = rope.get("original_max_position_embeddings")
            scaled_length = int(
                (original or self["max_position_embeddings"]) * rope.get("factor", 1)
            )
            lacks.append(f"rope scaling {rope} (only default, or llama3 with {_LLAMA3_SCALING})")
        window = self._sliding_window()
        if window:
            lacks.append(f"sliding_window={window}")
        return {
            "rope_theta": float(theta),
            "rotary_fraction": fraction,
            "rope_scaling_factor": scaling_factor,
            "scaled_context_length": scaled_length,
            "megatron_lacks": tuple(lacks),
        }

    def _sliding_window(self) -> int:
        """Tokens of the window that attention is limited to; 0: no limit."""
        is_mistral = self["model_type"] in ("mistral", "mixtral")
        if not self.get("use_sliding_window", is_mistral):
            return 0
        window: int = self.get("sliding_window", 0)
        return window
