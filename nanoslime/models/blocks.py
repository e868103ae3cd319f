"""The weight rules of the blocks that decoders are made of: ends, attention, MLPs, experts.

An architecture's file puts its rules together from these.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nanoslime.models.rules import FLOAT32, HFTensor, RowLayout, Rule, Shapes
from nanoslime.models.shape import ModelShape

# What Hugging Face calls the matrices of a gated MLP: inwards, and the one outwards.
_GATED = ("gate_proj", "up_proj", "down_proj")
FUSED = ("gate_up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """Makes the rules of some decoder layers; names are relative to the layer."""

    numbers: tuple[int, ...]
    hf_prefix: str = "model.layers.{l}."
    megatron_prefix: str = "decoder.layers.{l}."
    num_experts: int = 0

    def rule(
        self,
        megatron: str,
        hf: Shapes,
        layout: RowLayout = "copy",
        *,
        tp_dim: int | None = None,
        local_spec_name: str | None = None,
    ) -> Rule:
        """The Megatron tensor that these Hugging Face tensors make up, in each of the layers.

        All names are relative to the layer; `tp_dim` is what tensor parallelism splits.
        """
        tensors = [HFTensor(self.hf_prefix + name, shape) for name, shape in hf.items()]
        if local_spec_name is not None:
            local_spec_name = self.megatron_prefix + local_spec_name
        return Rule(
            self.megatron_prefix + megatron,
            layout,
            tuple(tensors),
            tp_dim=tp_dim,
            layers=self.numbers,
            num_experts=self.num_experts,
            local_spec_name=local_spec_name,
        )


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
    rows = {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv}
    weights: Shapes = {f"{name}.weight": (size, hidden) for name, size in rows.items()}
    rules = [
        layers.rule(
            "self_attention.linear_qkv.layer_norm_weight",
            {"input_layernorm.weight": (hidden,)},
            local_spec_name="input_layernorm.weight",
        ),
        layers.rule("self_attention.linear_qkv.weight", weights, "qkv", tp_dim=0),
        layers.rule(
            "self_attention.linear_proj.weight", {"self_attn.o_proj.weight": (hidden, q)}, tp_dim=1
        ),
    ]
    if shape.qkv_bias:
        biases: Shapes = {f"{name}.bias": (size,) for name, size in rows.items()}
        rules.append(layers.rule("self_attention.linear_qkv.bias", biases, "qkv", tp_dim=0))
    if shape.qk_norm:
        for name in ("q", "k"):
            norm: Shapes = {f"self_attn.{name}_norm.weight": (shape.head_dim,)}
            rules.append(layers.rule(f"self_attention.{name}_layernorm.weight", norm))
    return rules


def gated_mlp(
    layers: Layers, megatron: str, hf: str, size: tuple[int, int], matrices: Sequence[str] = _GATED
) -> list[Rule]:
    """The matrices of a gated MLP, hidden_size -> intermediate_size -> hidden_size.

    `megatron` and `hf` are its prefixes in the layer, `size` is (intermediate_size,
    hidden_size). `matrices` are gate, up and down, or FUSED where gate and up are one tensor.
    """
    intermediate, hidden = size
    *inwards, outwards = matrices
    rows = 2 * intermediate // len(inwards)
    gate_up: Shapes = {f"{hf}{name}.weight": (rows, hidden) for name in inwards}
    down: Shapes = {f"{hf}{outwards}.weight": (hidden, intermediate)}
    layout: RowLayout = "halves" if len(inwards) == 1 else "cat"
    return [
        layers.rule(f"{megatron}linear_fc1.weight", gate_up, layout, tp_dim=0),
        layers.rule(f"{megatron}linear_fc2.weight", down, tp_dim=1),
    ]


def dense_mlp(
    shape: ModelShape, layers: Layers | None = None, matrices: Sequence[str] = _GATED
) -> list[Rule]:
    """A gated MLP and the norm before it, in `layers` (None: in all)."""
    layers = layers or all_layers(shape)
    norm = layers.rule(
        "mlp.linear_fc1.layer_norm_weight",
        {"post_attention_layernorm.weight": (shape.hidden_size,)},
        local_spec_name="pre_mlp_layernorm.weight",
    )
    size = (shape.intermediate_size, shape.hidden_size)
    return [norm, *gated_mlp(layers, "mlp.", "mlp.", size, matrices)]


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
    matrices: Sequence[str] = _GATED


DEEPSEEK_NAMES = ExpertNames()


def experts_mlp(shape: ModelShape, names: ExpertNames = DEEPSEEK_NAMES) -> list[Rule]:
    """Router, experts and shared experts of the layers that have them, and the norm
    before them."""
    moe = shape.moe
    assert moe is not None
    hidden = shape.hidden_size
    layers = Layers(numbers=moe.layers)
    experts = Layers(numbers=moe.layers, num_experts=moe.num_experts)
    size = (moe.intermediate_size, hidden)
    rules = [
        layers.rule(
            "pre_mlp_layernorm.weight",
            {"post_attention_layernorm.weight": (hidden,)},
            # The key that the local layer spec gives the norm in torch_dist.
            local_spec_name="mlp.linear_fc1.layer_norm_weight",
        ),
        layers.rule("mlp.router.weight", {f"{names.block}gate.weight": (moe.num_experts, hidden)}),
        *gated_mlp(
            experts,
            "mlp.experts.experts.{e}.",
            f"{names.block}experts.{{e}}.",
            size,
            names.matrices,
        ),
    ]
    if moe.score_bias:
        bias: Shapes = {f"{names.block}{FLOAT32}": (moe.num_experts,)}
        rules.append(layers.rule("mlp.router.expert_bias", bias))
    if moe.shared_intermediate_size:
        size = (moe.shared_intermediate_size, hidden)
        rules += gated_mlp(layers, "mlp.shared_experts.", names.shared, size)
    if moe.shared_gate:
        gate: Shapes = {names.shared_gate: (1, hidden)}
        rules.append(layers.rule("mlp.shared_experts.gate_weight", gate))
    return rules


def mixed_mlp(shape: ModelShape, names: ExpertNames = DEEPSEEK_NAMES) -> list[Rule]:
    """Experts in some layers and dense MLPs in the others."""
    assert shape.moe is not None
    dense = [layer for layer in all_layers(shape).numbers if layer not in shape.moe.layers]
    return [*dense_mlp(shape, Layers(numbers=tuple(dense))), *experts_mlp(shape, names)]


def expert_decoder(shape: ModelShape, names: ExpertNames = DEEPSEEK_NAMES) -> list[Rule]:
    """The rules of a Llama-like decoder with experts."""
    return [*ends(shape), *attention(shape), *mixed_mlp(shape, names), *mtp(shape)]


def mtp(shape: ModelShape) -> list[Rule]:
    """The tensors of a multi-token prediction layer around its decoder layer (arXiv
    2412.19437, section 2.2)."""
    if not shape.num_mtp_layers:
        return []
    hidden = shape.hidden_size
    numbers = range(shape.num_layers, shape.num_layers + shape.num_mtp_layers)
    layers = Layers(numbers=tuple(numbers), megatron_prefix="mtp.layers.{i}.")
    return [
        layers.rule("enorm.weight", {"enorm.weight": (hidden,)}),
        layers.rule("hnorm.weight", {"hnorm.weight": (hidden,)}),
        layers.rule("eh_proj.weight", {"eh_proj.weight": (hidden, 2 * hidden)}, tp_dim=0),
        layers.rule("final_layernorm.weight", {"shared_head.norm.weight": (hidden,)}),
    ]
