"""The one weight map: which rows of Hugging Face tensors make up a rank's Megatron tensors.

A rule says (Megatron name, layout, Hugging Face tensors, the dimension that tensor
parallelism splits). A Megatron tensor is a permutation of rows of its Hugging Face
tensors, so a conversion is a copy of boxes:

    copy    one tensor, as it is
    vocab   one tensor; Megatron pads its rows at the end to a multiple of the tensor-parallel size
    cat     the tensors one after the other; each is split by itself, so a rank holds [gate_r; up_r]
    halves  one tensor that holds [gate; up] already; each half is split by itself
    qkv     for each query group its query rows, then its key rows, then its value rows

Loading, live weight sync, offline conversion and the tests all read these boxes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil, prod
from typing import Literal, NamedTuple

from nanoslime.models.parallel_sizes import check_tp_size
from nanoslime.models.shape import ModelShape
from nanoslime.types import RunError

RowLayout = Literal["copy", "vocab", "cat", "halves", "qkv"]

Shapes = dict[str, tuple[int, ...]]
"""Of Hugging Face tensors, by name."""

Box = tuple[slice, ...]
"""A slice for each dimension, with start and stop set."""

# Tensors whose Hugging Face name ends so are float32, whatever the model's dtype is.
FLOAT32 = "gate.e_score_correction_bias"

# Hugging Face names of what every implementation computes from config.json; files of
# earlier days hold it, in each layer.
_COMPUTED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")

# Rows of the vocabulary on each rank are a multiple of this, for the matrix kernels.
VOCAB_MULTIPLE = 8


def whole(shape: Iterable[int]) -> Box:
    """The box of all elements of a tensor."""
    return tuple(slice(0, length) for length in shape)


class HFTensor(NamedTuple):
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """How Hugging Face tensors make up the Megatron tensors of some layers and experts.

    In names {l} is the layer, {e} the expert, {i} the multi-token prediction layer.
    `megatron` is the name in torch_dist files and in Transformer Engine modules.
    Experts are named one by one, `mlp.experts.experts.{e}.linear_fc1.weight`.
    """

    megatron: str
    layout: RowLayout
    hf_tensors: tuple[HFTensor, ...]
    tp_dim: int | None = None
    # None: the tensor is outside of the layers.
    layers: tuple[int, ...] | None = None
    # 0: the tensor belongs to no expert.
    num_experts: int = 0
    # The name in modules of the local layer spec, where it differs.
    local_spec_name: str | None = None

    def num_elements(self, shape: ModelShape) -> int:
        """Elements of its Hugging Face tensors in a model without multi-token prediction."""
        if self.is_output_layer and shape.tie_word_embeddings:
            return 0
        num_layers = 1
        if self.layers is not None:
            num_layers = sum(layer < shape.num_layers for layer in self.layers)
        num_experts = self.num_experts or 1
        each = sum(prod(tensor.shape) for tensor in self.hf_tensors)
        return num_layers * num_experts * each

    @property
    def is_embedding(self) -> bool:
        return self.megatron.startswith("embedding.")

    @property
    def is_output_layer(self) -> bool:
        return self.megatron.startswith("output_layer.")


@dataclass(frozen=True, slots=True)
class Piece:
    """One box of a Hugging Face tensor and where it lies in a rank's Megatron tensor."""

    hf: str
    # Shape of the whole Hugging Face tensor.
    full_shape: tuple[int, ...]
    # Where the piece lies in the Hugging Face tensor.
    box: Box
    megatron: str
    # The Megatron tensor's name in the local layer spec; mostly the same.
    local_spec_name: str
    # Where the piece lies in the rank's Megatron tensor.
    local: Box
    rule: Rule


@dataclass(frozen=True, slots=True)
class ModelPartition:
    """What of a model one rank holds; the default is all, without multi-token prediction."""

    tp_rank: int = 0
    tp_size: int = 1
    # None: all decoder layers.
    layers: range | None = None
    # Whether it holds the input embedding.
    first: bool = True
    # Whether it holds the final norm and the output layer.
    last: bool = True
    # The experts it holds of every layer that has them; None: all.
    experts: range | None = None
    # Tensor-parallel rank and size within an expert; None: as outside of experts.
    expert_tp: tuple[int, int] | None = None
    # Whether it holds the multi-token prediction layers.
    mtp: bool = False

    def holds_layer(self, layer: int, shape: ModelShape) -> bool:
        if layer >= shape.num_layers:
            return self.mtp
        return self.layers is None or layer in self.layers

    def experts_of(self, rule: Rule) -> range:
        """The experts here that the rule has tensors of; range(1) for a rule of no expert."""
        if not rule.num_experts:
            return range(1)
        return range(rule.num_experts) if self.experts is None else self.experts

    def tensor_parallel(self, rule: Rule) -> tuple[int, int]:
        """Tensor-parallel rank and size of the rule's tensors."""
        if rule.num_experts and self.expert_tp:
            return self.expert_tp
        return self.tp_rank, self.tp_size


def tensors(shape: ModelShape, *, mtp: bool = False) -> Shapes:
    """Name -> full shape of every Hugging Face tensor in the model's files, without repeats."""
    return {piece.hf: piece.full_shape for piece in pieces(shape, ModelPartition(mtp=mtp))}


def repeats(shape: ModelShape) -> dict[str, str]:
    """Tensors that a file may hold and that repeat another one: name -> the repeated one."""
    embedding = "model.embed_tokens.weight"
    head = "lm_head.weight"
    found = {}
    if shape.tie_word_embeddings:
        found[head] = embedding
        head = embedding
    for layer in range(shape.num_layers, shape.num_layers + shape.num_mtp_layers):
        found[f"model.layers.{layer}.embed_tokens.weight"] = embedding
        found[f"model.layers.{layer}.shared_head.head.weight"] = head
    return found


def has_mtp(shape: ModelShape, names: Iterable[str]) -> bool:
    """Whether a checkpoint with these Hugging Face tensors holds the multi-token
    prediction layers."""
    prefix = f"model.layers.{shape.num_layers}."
    return shape.num_mtp_layers > 0 and any(name.startswith(prefix) for name in names)


def optional_tensors(shape: ModelShape) -> Shapes:
    """Name -> shape of what files may hold beside `tensors(shape)`, and no backend trains:
    repeats and the layers of multi-token prediction."""
    every = tensors(shape, mtp=True)
    found = {name: every[repeated] for name, repeated in repeats(shape).items()}
    for name in every.keys() - tensors(shape).keys():
        found[name] = every[name]
    return found


def is_computed(name: str) -> bool:
    """Whether a file's tensor is not the model's, but computed from config.json."""
    return name.endswith(_COMPUTED)


def check_tensors(
    shape: ModelShape, present: Shapes, where: str, files: dict[str, str] | None = None
) -> None:
    """Raises RunError unless the tensors at `where` are exactly the model's.

    `present` maps their names to their shapes. Multi-token prediction layers may be
    there, whole, or not; repeats, such as a tied lm_head.weight, too. What is computed is
    not looked at. `files` says where each tensor is, for the message.
    """
    file_of = files or {}
    expected = tensors(shape, mtp=has_mtp(shape, present))
    for name, repeated in repeats(shape).items():
        if name in present:
            expected[name] = expected[repeated]
    for name, full_shape in expected.items():
        if name not in present:
            raise RunError(
                f"{where} has no tensor {name} {list(full_shape)}, part of every {shape.model_type}"
            )
        if tuple(present[name]) != full_shape:
            raise RunError(
                f"{file_of.get(name, where)}: {name} is {list(present[name])}, "
                f"config.json asks for {list(full_shape)}"
            )
    unknown = present.keys() - expected.keys()
    extra = sorted(name for name in unknown if not is_computed(name))
    if extra:
        raise RunError(
            f"{file_of.get(extra[0], where)}: {len(extra)} tensors do not belong to a "
            f"{shape.model_type}: {extra[:3]}"
        )


def pieces(shape: ModelShape, partition: ModelPartition | None = None) -> list[Piece]:
    """Everything that `partition` holds of the model (None: all of it), in a fixed order.

    A tied output layer is there only on a last stage that is not the first; it then
    repeats the embedding. Raises RunError where the partition's tensor-parallel size
    does not divide the model.
    """
    partition = partition or ModelPartition()
    check_tp_size(shape, partition.tp_size)
    found: list[Piece] = []
    for rule in shape.architecture.rules(shape):
        for names in _instances(rule, shape, partition):
            found += _instance_pieces(rule, names, shape, partition)
    return found


@dataclass(frozen=True, slots=True)
class _Names:
    """Fills in the names of a rule for one layer and one expert."""

    layer: int
    expert: int
    num_layers: int

    def fill_in(self, pattern: str) -> str:
        mtp_layer = self.layer - self.num_layers
        if mtp_layer >= 0:
            pattern = pattern.replace("decoder.layers.{l}.", "mtp.layers.{i}.transformer_layer.")
        return pattern.format(l=self.layer, e=self.expert, i=mtp_layer)


def _instances(rule: Rule, shape: ModelShape, partition: ModelPartition) -> Iterator[_Names]:
    """The layers and experts of the rule that are here; one for a rule outside of layers."""
    if rule.layers is None:
        if _holds_end(rule, shape, partition):
            yield _Names(0, 0, shape.num_layers)
        return
    for layer in rule.layers:
        if partition.holds_layer(layer, shape):
            for expert in partition.experts_of(rule):
                yield _Names(layer, expert, shape.num_layers)


def _holds_end(rule: Rule, shape: ModelShape, partition: ModelPartition) -> bool:
    """Whether the partition holds the tensor of a rule outside of the layers."""
    if rule.is_embedding:
        return partition.first
    if rule.is_output_layer and shape.tie_word_embeddings and partition.first:
        return False
    return partition.last


def _instance_pieces(
    rule: Rule, names: _Names, shape: ModelShape, partition: ModelPartition
) -> Iterator[Piece]:
    # Rows of the rank's tensor that are filled so far, where the layout stacks rows.
    filled = 0
    for index, split in _segments(rule, shape, partition):
        tensor = rule.hf_tensors[index]
        box = list(whole(tensor.shape))
        if rule.tp_dim is not None:
            box[rule.tp_dim] = split
        local = [slice(0, _length(along)) for along in box]
        if rule.tp_dim == 0:
            local[0] = slice(filled, filled + _length(split))
            filled += _length(split)
        # A rank may hold nothing but padding of the vocabulary.
        if all(_length(along) > 0 for along in box):
            yield Piece(
                hf=names.fill_in(tensor.name),
                full_shape=tensor.shape,
                box=tuple(box),
                megatron=names.fill_in(rule.megatron),
                local_spec_name=names.fill_in(rule.local_spec_name or rule.megatron),
                local=tuple(local),
                rule=rule,
            )


def _length(along: slice) -> int:
    return along.stop - along.start


def _segments(
    rule: Rule, shape: ModelShape, partition: ModelPartition
) -> Iterator[tuple[int, slice]]:
    """(index in rule.hf_tensors, range along tp_dim), in the order of the rank's tensor."""
    rank, size = partition.tensor_parallel(rule)
    lengths = [tensor.shape[rule.tp_dim or 0] for tensor in rule.hf_tensors]
    if rule.layout == "vocab":
        rows = padded_vocab_size(shape, size) // size
        start = min(rank * rows, lengths[0])
        yield 0, slice(start, min(start + rows, lengths[0]))
    elif rule.layout == "qkv":
        num_groups = shape.num_key_value_heads
        for group in range(rank * num_groups // size, (rank + 1) * num_groups // size):
            for index, length in enumerate(lengths):
                yield index, _share(length, group, num_groups)
    elif rule.layout == "halves":
        half = lengths[0] // 2
        for start in (0, half):
            share = _share(half, rank, size)
            yield 0, slice(start + share.start, start + share.stop)
    else:
        for index, length in enumerate(lengths):
            yield index, _share(length, rank, size)


def _share(length: int, rank: int, size: int) -> slice:
    """The rank's range of `length` rows that are divided into `size` equal ranges."""
    return slice(rank * length // size, (rank + 1) * length // size)


def padded_vocab_size(shape: ModelShape, tp_size: int) -> int:
    """Rows of Megatron's embedding over all ranks. Rows from shape.vocab_size on are padding."""
    multiple = VOCAB_MULTIPLE * tp_size
    return ceil(shape.vocab_size / multiple) * multiple
