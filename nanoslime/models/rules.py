"""The one weight map: which rows of which Hugging Face tensors make up a Megatron tensor, on any rank.

A rule says (Megatron name, layout, Hugging Face tensors, the dimension that tensor parallelism splits). A
Megatron tensor is a permutation of rows of its Hugging Face parts, so a conversion is a copy of boxes:

    copy    one part, as it is
    vocab   one part; Megatron pads its rows at the end to a multiple of the tensor-parallel size
    cat     the parts one after the other; every part is split by itself, so a rank holds [gate_r; up_r]
    halves  one part that holds [gate; up] already; each half is split by itself
    qkv     for each query group its query rows, then its key rows, then its value rows

Loading, live weight sync, offline conversion and the tests all read these boxes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Literal

from nanoslime.models.parallel_sizes import check_tp_size
from nanoslime.models.shape import ModelShape

Box = tuple[slice, ...]  # one slice per dimension, start and stop set
Gated = tuple[str, str, str]  # the gate, up and down matrix of an MLP
GATED: Gated = ("gate_proj", "up_proj", "down_proj")
FLOAT32 = "gate.e_score_correction_bias"  # names ending so: float32 whatever the model's dtype, everywhere
VOCAB_MULTIPLE = 8  # rows of the vocabulary per rank are a multiple of this, for the matrix kernels


@dataclass(frozen=True, slots=True)
class Rule:
    """{l} in a name is the layer, {e} the expert, {i} the multi-token prediction layer.

    `megatron` is the name in torch_dist files and in Transformer Engine modules, `local` the one of the local
    layer spec where that differs. Experts are named one by one, `mlp.experts.experts.{e}.linear_fc1.weight`.
    """

    megatron: str
    layout: Literal["copy", "vocab", "cat", "halves", "qkv"]
    hf_tensors: tuple[tuple[str, tuple[int, ...]], ...]  # Hugging Face name, full shape
    tp_dim: int | None = None
    layers: tuple[int, ...] | None = None  # None: outside of the layers
    num_experts: int = 0
    local: str | None = None

    def num_elements(self, shape: ModelShape) -> int:
        """Elements of its Hugging Face tensors in a model without multi-token prediction."""
        if self.megatron.startswith("output_layer.") and shape.tie_word_embeddings:
            return 0
        layers = (
            1 if self.layers is None else sum(layer < shape.num_layers for layer in self.layers)
        )
        return layers * (self.num_experts or 1) * sum(prod(full) for _, full in self.hf_tensors)


@dataclass(frozen=True, slots=True)
class Piece:
    """One box of a Hugging Face tensor and where it lies in a rank's Megatron tensor."""

    hf: str
    full_shape: tuple[int, ...]  # of the Hugging Face tensor
    box: Box  # in it
    megatron: str
    other: str  # the Megatron tensor's second name, see Rule.local
    local: Box  # in the rank's tensor
    rule: Rule


@dataclass(frozen=True, slots=True)
class ModelPartition:
    """The part of a model that one rank holds; the default is all of it, without multi-token prediction."""

    tp_rank: int = 0
    tp_size: int = 1
    layers: range | None = None  # None: all
    first: bool = True  # holds the input embedding
    last: bool = True  # holds the final norm and the output layer
    experts: range | None = None  # of every layer that has them; None: all
    expert_tp: tuple[int, int] | None = None  # rank and size within an expert; None: those of tp
    mtp: bool = False  # holds the multi-token prediction layers


@dataclass(frozen=True, slots=True)
class Layers:
    """Makes the rules of decoder layers; names are relative to the layer."""

    layers: tuple[int, ...]
    hf: str = "model.layers.{l}."
    megatron: str = "decoder.layers.{l}."
    num_experts: int = field(default=0, kw_only=True)

    def copy(
        self,
        megatron: str,
        hf: str,
        *full: int,
        tp_dim: int | None = None,
        local: str | None = None,
    ) -> Rule:
        return self.stack(megatron, "copy", [hf], [full], tp_dim, local)

    def stack(
        self,
        megatron: str,
        layout: Literal["copy", "cat", "halves", "qkv"],
        hf: list[str],
        full: list[tuple[int, ...]],
        tp_dim: int | None = 0,
        local: str | None = None,
    ) -> Rule:
        parts = tuple((self.hf + name, sizes) for name, sizes in zip(hf, full, strict=True))
        other = None if local is None else self.megatron + local
        return Rule(
            self.megatron + megatron, layout, parts, tp_dim, self.layers, self.num_experts, other
        )


def all_layers(shape: ModelShape) -> Layers:
    """The decoder's layers, and after them those of multi-token prediction."""
    return Layers(tuple(range(shape.num_layers + shape.num_mtp_layers)))


def ends(shape: ModelShape) -> list[Rule]:
    """Embedding, final norm and output layer."""
    full = (shape.vocab_size, shape.hidden_size)
    embedding = "model.embed_tokens.weight"
    head = embedding if shape.tie_word_embeddings else "lm_head.weight"
    return [
        Rule("embedding.word_embeddings.weight", "vocab", ((embedding, full),), 0),
        Rule("decoder.final_layernorm.weight", "copy", (("model.norm.weight", full[1:]),)),
        Rule("output_layer.weight", "vocab", ((head, full),), 0),
    ]


def attention(shape: ModelShape) -> list[Rule]:
    """Attention with query groups, and the norm before it."""
    h, d, layer = shape.hidden_size, shape.head_dim, all_layers(shape)
    q, kv = shape.num_attention_heads * d, shape.num_key_value_heads * d
    proj = [f"self_attn.{x}_proj." for x in "qkv"]
    weight, bias = [x + "weight" for x in proj], [x + "bias" for x in proj]
    rules = [
        layer.copy(
            "self_attention.linear_qkv.layer_norm_weight",
            "input_layernorm.weight",
            h,
            local="input_layernorm.weight",
        ),
        layer.stack("self_attention.linear_qkv.weight", "qkv", weight, [(q, h), (kv, h), (kv, h)]),
        layer.copy("self_attention.linear_proj.weight", "self_attn.o_proj.weight", h, q, tp_dim=1),
    ]
    if shape.qkv_bias:
        rules.append(
            layer.stack("self_attention.linear_qkv.bias", "qkv", bias, [(q,), (kv,), (kv,)])
        )
    for x in "qk" if shape.qk_norm else "":
        rules.append(
            layer.copy(f"self_attention.{x}_layernorm.weight", f"self_attn.{x}_norm.weight", d)
        )
    return rules


def dense_mlp(
    shape: ModelShape, layers: Layers | None = None, *, fused: bool = False
) -> list[Rule]:
    """A gated MLP and the norm before it; `fused`: Hugging Face holds gate and up in one tensor."""
    h, f, layer = shape.hidden_size, shape.intermediate_size, layers or all_layers(shape)
    norm, hf = "mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight"
    fc1, fc2 = _gated(layer, "mlp.", "mlp.", h, f)
    if fused:
        fc1 = layer.stack(
            "mlp.linear_fc1.weight", "halves", ["mlp.gate_up_proj.weight"], [(2 * f, h)]
        )
    return [layer.copy(norm, hf, h, local="pre_mlp_layernorm.weight"), fc1, fc2]


def dense_decoder(shape: ModelShape) -> list[Rule]:
    """The rules of a Llama-like decoder without experts."""
    return [*ends(shape), *attention(shape), *dense_mlp(shape)]


def experts_mlp(
    shape: ModelShape,
    *,
    block: str = "mlp.",
    names: Gated = GATED,
    shared: str = "mlp.shared_experts.",
) -> list[Rule]:
    """Router, experts and shared experts of the layers that have them, and the norm before them.

    names: of an expert's matrices; block, shared: the prefixes that Hugging Face gives them.
    """
    moe, h = shape.moe, shape.hidden_size
    assert moe is not None
    layer, expert = Layers(moe.layers), Layers(moe.layers, num_experts=moe.num_experts)
    norm = "mlp.linear_fc1.layer_norm_weight"  # the key that the local layer spec gives it in torch_dist
    each = "experts.{e}."
    rules = [
        layer.copy("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", h, local=norm),
        layer.copy("mlp.router.weight", block + "gate.weight", moe.num_experts, h),
        *_gated(expert, "mlp.experts." + each, block + each, h, moe.intermediate_size, names),
    ]
    if moe.score_bias:
        rules.append(layer.copy("mlp.router.expert_bias", block + FLOAT32, moe.num_experts))
    if moe.shared_intermediate_size:
        rules += _gated(layer, "mlp.shared_experts.", shared, h, moe.shared_intermediate_size)
    if moe.shared_gate:
        gate = shared.removesuffix(".") + "_gate.weight"
        rules.append(layer.copy("mlp.shared_experts.gate_weight", gate, 1, h))
    return rules


def _gated(
    layer: Layers, megatron: str, hf: str, h: int, f: int, names: Gated = GATED
) -> list[Rule]:
    """The matrices of a gated MLP, h -> f -> h; megatron, hf: what stands before their names."""
    gate, up, down = (f"{hf}{name}.weight" for name in names)
    return [
        layer.stack(megatron + "linear_fc1.weight", "cat", [gate, up], [(f, h), (f, h)]),
        layer.copy(megatron + "linear_fc2.weight", down, h, f, tp_dim=1),
    ]


def mixed_mlp(shape: ModelShape, shared: str = "mlp.shared_experts.") -> list[Rule]:
    """Experts in some layers and dense MLPs in the others."""
    assert shape.moe is not None
    dense = tuple(layer for layer in all_layers(shape).layers if layer not in shape.moe.layers)
    return [*dense_mlp(shape, Layers(dense)), *experts_mlp(shape, shared=shared)]


def mtp(shape: ModelShape) -> list[Rule]:
    """What a multi-token prediction layer has around its decoder layer (arXiv 2412.19437, section 2.2)."""
    if not shape.num_mtp_layers:
        return []
    h, first = shape.hidden_size, shape.num_layers
    layer = Layers(tuple(range(first, first + shape.num_mtp_layers)), megatron="mtp.layers.{i}.")
    return [
        layer.copy("enorm.weight", "enorm.weight", h),
        layer.copy("hnorm.weight", "hnorm.weight", h),
        layer.copy("eh_proj.weight", "eh_proj.weight", h, 2 * h, tp_dim=0),
        layer.copy("final_layernorm.weight", "shared_head.norm.weight", h),
    ]


def tensors(shape: ModelShape, *, mtp: bool = False) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor of the model, name -> full shape, as in its files (no repeats)."""
    return {piece.hf: piece.full_shape for piece in pieces(shape, ModelPartition(mtp=mtp))}


def repeats(shape: ModelShape) -> dict[str, str]:
    """Tensors that a file may hold although they are others once more: name -> the tensor they repeat."""
    head = "model.embed_tokens.weight" if shape.tie_word_embeddings else "lm_head.weight"
    found = {"lm_head.weight": head} if shape.tie_word_embeddings else {}
    for layer in range(shape.num_layers, shape.num_layers + shape.num_mtp_layers):
        found[f"model.layers.{layer}.embed_tokens.weight"] = "model.embed_tokens.weight"
        found[f"model.layers.{layer}.shared_head.head.weight"] = head
    return found


def pieces(shape: ModelShape, part: ModelPartition | None = None) -> list[Piece]:
    """Everything that `part` of the model (None: all of it) consists of, in a fixed order.

    A tied output layer is there only on a last stage that is not the first; it then repeats the embedding.
    Raises RunError where part's tensor-parallel size does not divide the model.
    """
    part = part or ModelPartition()
    check_tp_size(shape, part.tp_size)
    found: list[Piece] = []
    for rule in shape.architecture.rules(shape):
        if rule.layers is None and _is_here(rule, shape, part):
            found += _rule_pieces(rule, 0, 0, shape, part)
        experts = range(1)
        if rule.num_experts:
            experts = range(rule.num_experts) if part.experts is None else part.experts
        for layer in rule.layers or ():
            if (
                (part.layers is None or layer in part.layers)
                if layer < shape.num_layers
                else part.mtp
            ):
                for expert in experts:
                    found += _rule_pieces(rule, layer, expert, shape, part)
    return found


def padded_vocab_size(shape: ModelShape, tp_size: int) -> int:
    """Rows of Megatron's embedding over all ranks. Rows from shape.vocab_size on are padding."""
    multiple = VOCAB_MULTIPLE * tp_size
    return -(-shape.vocab_size // multiple) * multiple


def has_mtp(shape: ModelShape, names: Iterable[str]) -> bool:
    """Whether a checkpoint with these Hugging Face tensors holds the multi-token prediction layers."""
    prefix = f"model.layers.{shape.num_layers}."
    return shape.num_mtp_layers > 0 and any(name.startswith(prefix) for name in names)


def check_tensors(
    shape: ModelShape,
    present: dict[str, tuple[int, ...]],
    where: str,
    files: dict[str, str] | None = None,
) -> None:
    """Raises ValueError unless `present` (name -> shape), found at `where`, are exactly the model's tensors.
    files: where each of them is, for the message.

    Multi-token prediction layers may be there, whole, or not; repeats, such as a tied lm_head.weight, too.
    """
    expected, files = tensors(shape, mtp=has_mtp(shape, present)), files or {}
    expected |= {name: expected[of] for name, of in repeats(shape).items() if name in present}
    for name, full in expected.items():
        if name not in present:
            raise ValueError(
                f"{where} has no tensor {name} {list(full)}, part of every {shape.model_type}"
            )
        if tuple(present[name]) != full:
            file = files.get(name, where)
            raise ValueError(
                f"{file}: {name} is {list(present[name])}, config.json asks for {list(full)}"
            )
    extra = sorted(present.keys() - expected.keys())
    if extra:
        file = files.get(extra[0], where)
        raise ValueError(
            f"{file}: {len(extra)} tensors do not belong to a {shape.model_type}: {extra[:3]}"
        )


def _is_here(rule: Rule, shape: ModelShape, part: ModelPartition) -> bool:
    if rule.megatron.startswith("embedding."):
        return part.first
    if rule.megatron.startswith("output_layer."):
        return part.last and not (shape.tie_word_embeddings and part.first)
    return part.last


def _rule_pieces(
    rule: Rule, layer: int, expert: int, shape: ModelShape, part: ModelPartition
) -> Iterator[Piece]:
    def name(pattern: str) -> str:
        i = layer - shape.num_layers
        if i >= 0:
            pattern = pattern.replace("decoder.layers.{l}.", "mtp.layers.{i}.transformer_layer.")
        return pattern.format(l=layer, e=expert, i=i)

    megatron, other = name(rule.megatron), name(rule.local or rule.megatron)
    at = 0  # rows of the local tensor filled so far, where the layout stacks rows
    for index, rows in _segments(rule, shape, part):
        hf, full = rule.hf_tensors[index]
        box = [slice(0, size) for size in full]
        if rule.tp_dim is not None:
            box[rule.tp_dim] = rows
        local = [slice(0, side.stop - side.start) for side in box]
        if rule.tp_dim == 0:
            local[0] = slice(at, at + rows.stop - rows.start)
            at = local[0].stop
        if all(
            side.stop > side.start for side in box
        ):  # a rank may hold only padding of the vocabulary
            yield Piece(name(hf), full, tuple(box), megatron, other, tuple(local), rule)


def _segments(rule: Rule, shape: ModelShape, part: ModelPartition) -> Iterable[tuple[int, slice]]:
    """(part index, range along tp_dim) in the order of the local tensor."""
    rank, size = (part.tp_rank, part.tp_size)
    if rule.num_experts and part.expert_tp:
        rank, size = part.expert_tp
    lengths = [full[rule.tp_dim or 0] for _, full in rule.hf_tensors]
    if rule.layout == "vocab":
        rows = padded_vocab_size(shape, size) // size
        start = min(rank * rows, lengths[0])
        return [(0, slice(start, min(start + rows, lengths[0])))]
    if rule.layout == "qkv":
        groups = shape.num_key_value_heads
        mine = range(rank * groups // size, (rank + 1) * groups // size)
        cut = [[slice(g * n // groups, (g + 1) * n // groups) for n in lengths] for g in mine]
        return [part for group in cut for part in enumerate(group)]
    if rule.layout == "halves":
        n = lengths[0] // 2
        return [
            (0, slice(h * n + rank * n // size, h * n + (rank + 1) * n // size)) for h in (0, 1)
        ]
    return [(i, slice(rank * n // size, (rank + 1) * n // size)) for i, n in enumerate(lengths)]
