"""The one weight map: which rows of which Hugging Face tensors make up a Megatron tensor, on any rank.

A rule says (Megatron name, layout, Hugging Face tensors, the dimension that tensor parallelism splits). A
Megatron tensor is a permutation of rows of its Hugging Face parts, so a conversion is a copy of boxes:

    copy   one part, as it is
    vocab  one part; Megatron pads its rows at the end to a multiple of the tensor-parallel size
    cat    the parts one after the other; every part is split by itself, so a rank holds [gate_r; up_r]
    qkv    for each query group its query rows, then its key rows, then its value rows

Loading, live weight sync, offline conversion and the tests all read these boxes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from nanoslime.models.shape import ModelShape

Box = tuple[slice, ...]  # one slice per dimension, start and stop set
VOCAB_MULTIPLE = 8  # rows of the vocabulary per rank are a multiple of this, for the matrix kernels


@dataclass(frozen=True, slots=True)
class Rule:
    """`megatron` is the name in torch_dist files and in Transformer Engine modules; {l} is the layer."""

    megatron: str
    layout: Literal["copy", "vocab", "cat", "qkv"]
    parts: tuple[tuple[str, tuple[int, ...]], ...]  # Hugging Face name with {l}, full shape
    tp_dim: int | None = None

    @property
    def per_layer(self) -> bool:
        return "{l}" in self.megatron


@dataclass(frozen=True, slots=True)
class Piece:
    """One box of a Hugging Face tensor and where it lies in a rank's Megatron tensor."""

    hf: str
    full_shape: tuple[int, ...]  # of the Hugging Face tensor
    box: Box  # in it
    megatron: str
    local: Box  # in the rank's tensor


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a model that one rank holds; the default is all of it."""

    tp_rank: int = 0
    tp_size: int = 1
    layers: range | None = None  # None: all
    first: bool = True  # holds the input embedding
    last: bool = True  # holds the final norm and the output layer


def dense_decoder(shape: ModelShape) -> list[Rule]:
    """The rules of a Llama-like decoder without experts."""
    h, f, d = shape.hidden_size, shape.intermediate_size, shape.head_dim
    q, kv = shape.num_attention_heads * d, shape.num_key_value_heads * d
    m, n = "decoder.layers.{l}.", "model.layers.{l}."
    attention, mlp = m + "self_attention.", m + "mlp."
    qkv = [(n + f"self_attn.{x}_proj.", rows) for x, rows in (("q", q), ("k", kv), ("v", kv))]
    gate_up = tuple((n + f"mlp.{x}_proj.weight", (f, h)) for x in ("gate", "up"))

    def copy(megatron: str, name: str, *full: int, tp_dim: int | None = None) -> Rule:
        return Rule(megatron, "copy", ((name, full),), tp_dim)

    def vocab(megatron: str, name: str) -> Rule:
        return Rule(megatron, "vocab", ((name, (shape.vocab_size, h)),), 0)

    rules = [
        vocab("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        copy(attention + "linear_qkv.layer_norm_weight", n + "input_layernorm.weight", h),
        Rule(attention + "linear_qkv.weight", "qkv", tuple((x + "weight", (rows, h)) for x, rows in qkv), 0),
        copy(attention + "linear_proj.weight", n + "self_attn.o_proj.weight", h, q, tp_dim=1),
        copy(mlp + "linear_fc1.layer_norm_weight", n + "post_attention_layernorm.weight", h),
        Rule(mlp + "linear_fc1.weight", "cat", gate_up, 0),
        copy(mlp + "linear_fc2.weight", n + "mlp.down_proj.weight", h, f, tp_dim=1),
        copy("decoder.final_layernorm.weight", "model.norm.weight", h),
    ]
    if shape.qkv_bias:
        bias = tuple((x + "bias", (rows,)) for x, rows in qkv)
        rules.append(Rule(attention + "linear_qkv.bias", "qkv", bias, 0))
    if shape.qk_norm:
        rules += [
            copy(attention + f"{x}_layernorm.weight", n + f"self_attn.{x}_norm.weight", d) for x in "qk"
        ]
    head = "model.embed_tokens.weight" if shape.tie_word_embeddings else "lm_head.weight"
    return [*rules, vocab("output_layer.weight", head)]


def tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor of the model, name -> full shape, as in its files (no tied lm_head)."""
    found: dict[str, tuple[int, ...]] = {}
    for rule in shape.architecture.rules(shape):
        for layer in range(shape.num_layers) if rule.per_layer else [0]:
            found.update({name.format(l=layer): full for name, full in rule.parts})
    return found


def pieces(shape: ModelShape, part: Part | None = None) -> list[Piece]:
    """Everything that `part` of the model (None: all of it) consists of, in a fixed order.

    A tied output layer is there only on a last stage that is not the first; it then repeats the embedding.
    Raises ValueError where part.tp_size does not divide the model.
    """
    part = part or Part()
    check_tp_size(shape, part.tp_size)
    layers = range(shape.num_layers) if part.layers is None else part.layers
    found: list[Piece] = []
    for rule in shape.architecture.rules(shape):
        if _is_here(rule, shape, part):
            for layer in layers if rule.per_layer else [0]:
                found += _rule_pieces(rule, layer, shape, part)
    return found


def check_tp_size(shape: ModelShape, tp_size: int) -> None:
    """Raises ValueError where `tp_size` does not divide the heads, the query groups or the MLP."""
    fields = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    sizes = {field: getattr(shape, field) for field in fields}
    for field, size in sizes.items():
        if size % tp_size:
            fit = [n for n in range(1, size + 1) if not any(other % n for other in sizes.values())]
            raise ValueError(
                f"training.tp_size={tp_size} does not divide {field}={size}; choose one of {fit}"
            )


def padded_vocab_size(shape: ModelShape, tp_size: int) -> int:
    """Rows of Megatron's embedding over all ranks. Rows from shape.vocab_size on are padding."""
    multiple = VOCAB_MULTIPLE * tp_size
    return -(-shape.vocab_size // multiple) * multiple


def local_spec_name(megatron: str) -> str:
    """The parameter's name in Megatron's local layer spec, where the norms are modules of their own."""
    name = megatron.replace(".self_attention.linear_qkv.layer_norm_", ".input_layernorm.")
    return name.replace(".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm.")


def check_tensors(shape: ModelShape, present: dict[str, tuple[int, ...]], where: str) -> None:
    """Raises ValueError unless `present` (name -> shape), found at `where`, are exactly the model's tensors.

    A tied model's file may repeat the embedding as lm_head.weight; that one is not read.
    """
    expected = tensors(shape)
    if shape.tie_word_embeddings and "lm_head.weight" in present:
        expected["lm_head.weight"] = (shape.vocab_size, shape.hidden_size)
    for name, full in expected.items():
        if name not in present:
            raise ValueError(f"{where} has no tensor {name} {list(full)}, part of every {shape.model_type}")
        if tuple(present[name]) != full:
            raise ValueError(f"{where}: {name} is {list(present[name])}, config.json asks for {list(full)}")
    extra = sorted(present.keys() - expected.keys())
    if extra:
        raise ValueError(f"{where}: {len(extra)} tensors do not belong to a {shape.model_type}: {extra[:3]}")


def _is_here(rule: Rule, shape: ModelShape, part: Part) -> bool:
    if rule.megatron.startswith("embedding."):
        return part.first
    if rule.megatron.startswith("output_layer."):
        return part.last and not (shape.tie_word_embeddings and part.first)
    return rule.per_layer or part.last


def _rule_pieces(rule: Rule, layer: int, shape: ModelShape, part: Part) -> Iterator[Piece]:
    megatron = rule.megatron.format(l=layer)
    at = 0  # rows of the local tensor filled so far, where the layout stacks rows
    for index, rows in _segments(rule, shape, part):
        name, full = rule.parts[index]
        box = [slice(0, size) for size in full]
        if rule.tp_dim is not None:
            box[rule.tp_dim] = rows
        local = [slice(0, side.stop - side.start) for side in box]
        if rule.tp_dim == 0:
            local[0] = slice(at, at + rows.stop - rows.start)
            at = local[0].stop
        if all(side.stop > side.start for side in box):  # a rank may hold only padding of the vocabulary
            yield Piece(name.format(l=layer), full, tuple(box), megatron, tuple(local))


def _segments(rule: Rule, shape: ModelShape, part: Part) -> Iterable[tuple[int, slice]]:
    """(part index, range along tp_dim) in the order of the local tensor."""
    rank, size, dim = part.tp_rank, part.tp_size, rule.tp_dim or 0
    lengths = [full[dim] for _, full in rule.parts]
    if rule.layout == "vocab":
        rows = padded_vocab_size(shape, size) // size
        start = min(rank * rows, lengths[0])
        return [(0, slice(start, min(start + rows, lengths[0])))]
    if rule.layout == "qkv":
        groups = shape.num_key_value_heads
        mine = range(rank * groups // size, (rank + 1) * groups // size)
        cut = [[slice(g * n // groups, (g + 1) * n // groups) for n in lengths] for g in mine]
        return [part for group in cut for part in enumerate(group)]
    return [(i, slice(rank * n // size, (rank + 1) * n // size)) for i, n in enumerate(lengths)]
