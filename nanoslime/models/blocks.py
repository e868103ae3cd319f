"""The weight rules of the blocks that decoders are made of: ends, attention, MLPs, experts.

An architecture's file puts its rules together from these.
"""

from dataclasses import dataclass
from typing import Literal

from nanoslime.models.rules import FLOAT32, HFTensor, Rule
from nanoslime.models.shape import ModelShape

Combination = Literal["cat", "halves", "qkv"]
"""The layouts that take several Hugging Face tensors, or several blocks of rows of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """Makes the rules of some decoder layers; names are relative to the layer."""

    numbers: tuple[int, ...]
    hf_prefix: str = "model.layers.{l}."
    megatron_prefix: str = "decoder.layers.{l}."
    num_experts: int = 0

    def copy(
        self,
        megatron: str,
        hf: HFTensor,
        *,
        tp_dim: int | None = None,
        local_spec_name: str | None = None,
    ) -> Rule:
        """One Hugging Face tensor, as it is."""
        if local_spec_name is not None:
            local_spec_name = self.megatron_prefix + local_spec_name
        return Rule(
            self.megatron_prefix + megatron,
            "copy",
            self._absolute([hf]),
            tp_dim=tp_dim,
            layers=self.numbers,
            num_experts=self.num_experts,
            local_spec_name=local_spec_name,
        )

    def combine(self, megatron: str, layout: Combination, hf: list[HFTensor]) -> Rule:
        """Several Hugging Face tensors, or halves of one; tensor parallelism splits
        their rows."""
        return Rule(
            self.megatron_prefix + megatron,
            layout,
            self._absolute(hf),
            tp_dim=0,
            layers=self.numbers,
            num_experts=self.num_experts,
        )

    def _absolute(self, tensors: list[HFTensor]) -> tuple[HFTensor, ...]:
        return tuple(HFTensor(self.hf_prefix + name, shape) for name, shape in tensors)


def all_layers(shape: ModelShape) -> Layers:
    """The decoder's layers, and after them the layers of multi-token prediction."""
    return Layers(numbers=tuple(range(shape.num_layers + shape.num_mtp_layers)))


def ends(shape: ModelShape) -> list[Rule]:
    """Embedding, final norm and output layer."""
    vocabulary = (shape.vocab_size, shape.hidden_size)
    embedding = HFTensor("model.embed_tokens.weight", vocabulary)
    norm = HFTensor("model.norm.weight", (shape.hidden_size,))
    head = embedding
    if not shape.tie_word_embeddings:
        head = HFTensor("lm_head.weight", vocabulary)
    return [
        Rule("embedding.word_embeddings.weight", "vocab", (embedding,), tp_dim=0),
        Rule("decoder.final_layernorm.weight", "copy", (norm,)),
        Rule("output_layer.weight", "vocab", (head,), tp_dim=0),
    ]


def attention(shape: ModelShape) -> list[Rule]:
    """Attention with query groups, and the norm before it."""
    layers = all_layers(shape)
    hidden = shape.hidden_size
    q = shape.num_attention_heads * shape.head_dim
    kv = shape.num_key_value_heads * shape.head_dim
    rules = [
        layers.copy(
            "self_attention.linear_qkv.layer_norm_weight",
            HFTensor("input_layernorm.weight", (hidden,)),
            local_spec_name="input_layernorm.weight",
        ),
        layers.combine(
            "self_attention.linear_qkv.weight",
            "qkv",
            [
                HFTensor("self_attn.q_proj.weight", (q, hidden)),
                HFTensor("self_attn.k_proj.weight", (kv, hidden)),
                HFTensor("self_attn.v_proj.weight", (kv, hidden)),
            ],
        ),
        layers.copy(
            "self_attention.linear_proj.weight",
            HFTensor("self_attn.o_proj.weight", (hidden, q)),
            tp_dim=1,
        ),
    ]
    if shape.qkv_bias:
        biases = [
            HFTensor("self_attn.q_proj.bias", (q,)),
            HFTensor("self_attn.k_proj.bias", (kv,)),
            HFTensor("self_attn.v_proj.bias", (kv,)),
        ]
        rules.append(layers.combine("self_attention.linear_qkv.bias", "qkv", biases))
    if shape.qk_norm:
        q_norm = HFTensor("self_attn.q_norm.weight", (shape.head_dim,))
        k_norm = HFTensor("self_attn.k_norm.weight", (shape.head_dim,))
        rules.append(layers.copy("self_attention.q_layernorm.weight", q_norm))
        rules.append(layers.copy("self_attention.k_layernorm.weight", k_norm))
    return rules


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """The matrices of a gated MLP, hidden_size -> intermediate_size -> hidden_size."""

    # Both prefixes are relative to the layer.
    megatron_prefix: str
    hf_prefix: str
    hidden_size: int
    intermediate_size: int
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    def rules(self, layers: Layers) -> list[Rule]:
        inwards = (self.intermediate_size, self.hidden_size)
        gate = HFTensor(f"{self.hf_prefix}{self.gate}.weight", inwards)
        up = HFTensor(f"{self.hf_prefix}{self.up}.weight", inwards)
        fc1 = layers.combine(f"{self.megatron_prefix}linear_fc1.weight", "cat", [gate, up])
        return [fc1, self._fc2(layers)]

    def fused_rules(self, layers: Layers) -> list[Rule]:
        """The rules where Hugging Face holds gate and up in one tensor."""
        both = (2 * self.intermediate_size, self.hidden_size)
        gate_up = HFTensor(f"{self.hf_prefix}gate_up_proj.weight", both)
        fc1 = layers.combine(f"{self.megatron_prefix}linear_fc1.weight", "halves", [gate_up])
        return [fc1, self._fc2(layers)]

    def _fc2(self, layers: Layers) -> Rule:
        outwards = (self.hidden_size, self.intermediate_size)
        down = HFTensor(f"{self.hf_prefix}{self.down}.weight", outwards)
        return layers.copy(f"{self.megatron_prefix}linear_fc2.weight", down, tp_dim=1)


def dense_mlp(
    shape: ModelShape, layers: Layers | None = None, *, fused: bool = False
) -> list[Rule]:
    """A gated MLP and the norm before it, in `layers` (None: in all).

    `fused` says that Hugging Face holds gate and up in one tensor.
    """
    layers = layers or all_layers(shape)
    norm = layers.copy(
        "mlp.linear_fc1.layer_norm_weight",
        HFTensor("post_attention_layernorm.weight", (shape.hidden_size,)),
        local_spec_name="pre_mlp_layernorm.weight",
    )
    mlp = GatedMLP("mlp.", "mlp.", shape.hidden_size, shape.intermediate_size)
    matrices = mlp.fused_rules(layers) if fused else mlp.rules(layers)
    return [norm, *matrices]


def dense_decoder(shape: ModelShape) -> list[Rule]:
    """The rules of a Llama-like decoder without experts."""
    return [*ends(shape), *attention(shape), *dense_mlp(shape)]


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """What Hugging Face calls the experts of a layer; the defaults are DeepSeek's names."""

    # The prefix of router and experts, relative to the layer.
    block: str = "mlp."
    # The prefix of the shared experts, relative to the layer.
    shared: str = "mlp.shared_experts."
    # The gate of the shared experts' output, relative to the layer.
    shared_gate: str = "mlp.shared_experts_gate.weight"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


DEEPSEEK_NAMES = ExpertNames()


def experts_mlp(shape: ModelShape, names: ExpertNames = DEEPSEEK_NAMES) -> list[Rule]:
    """Router, experts and shared experts of the layers that have them, and the norm
    before them."""
    moe = shape.moe
    assert moe is not None
    hidden = shape.hidden_size
    layers = Layers(numbers=moe.layers)
    experts = Layers(numbers=moe.layers, num_experts=moe.num_experts)
    expert = GatedMLP(
        "mlp.experts.experts.{e}.",
        names.block + "experts.{e}.",
        hidden,
        moe.intermediate_size,
        gate=names.gate,
        up=names.up,
        down=names.down,
    )
    router = HFTensor(names.block + "gate.weight", (moe.num_experts, hidden))
    rules = [
        layers.copy(
            "pre_mlp_layernorm.weight",
            HFTensor("post_attention_layernorm.weight", (hidden,)),
            # The key that the local layer spec gives the norm in torch_dist.
            local_spec_name="mlp.linear_fc1.layer_norm_weight",
        ),
        layers.copy("mlp.router.weight", router),
        *expert.rules(experts),
    ]
    if moe.score_bias:
        bias = HFTensor(names.block + FLOAT32, (moe.num_experts,))
        rules.append(layers.copy("mlp.router.expert_bias", bias))
    if moe.shared_intermediate_size:
        shared = GatedMLP("mlp.shared_experts.", names.shared, hidden, moe.shared_intermediate_size)
        rules += shared.rules(layers)
    if moe.shared_gate:
        gate = HFTensor(names.shared_gate, (1, hidden))
        rules.append(layers.copy("mlp.shared_experts.gate_weight", gate))
    return rules


def mixed_mlp(shape: ModelShape, names: ExpertNames = DEEPSEEK_NAMES) -> list[Rule]:
    """Experts in some layers and dense MLPs in the others."""
    assert shape.moe is not None
    dense = [layer for layer in all_layers(shape).numbers if layer not in shape.moe.layers]
    return [*dense_mlp(shape, Layers(numbers=tuple(dense))), *experts_mlp(shape, names)]


def mtp(shape: ModelShape) -> list[Rule]:
    """The tensors of a multi-token prediction layer around its decoder layer (arXiv
    2412.19437, section 2.2)."""
    if not shape.num_mtp_layers:
        return []
    hidden = shape.hidden_size
    numbers = range(shape.num_layers, shape.num_layers + shape.num_mtp_layers)
    layers = Layers(numbers=tuple(numbers), megatron_prefix="mtp.layers.{i}.")
    return [
        layers.copy("enorm.weight", HFTensor("enorm.weight", (hidden,))),
        layers.copy("hnorm.weight", HFTensor("hnorm.weight", (hidden,))),
        layers.copy("eh_proj.weight", HFTensor("eh_proj.weight", (hidden, 2 * hidden)), tp_dim=0),
        layers.copy("final_layernorm.weight", HFTensor("shared_head.norm.weight", (hidden,))),
    ]
