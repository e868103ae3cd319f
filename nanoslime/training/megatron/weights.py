"""Hugging Face weights into this rank's parameters, and its parameters as pieces of Hugging Face tensors."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from safetensors import SafetensorError, safe_open

from nanoslime.batch import WeightShard
from nanoslime.models.freezing import frozen_names
from nanoslime.models.rules import ModelPartition, Piece, check_tensors, pieces, tensors
from nanoslime.models.shape import ModelShape
from nanoslime.storage.safetensors_file import TensorInfo, read_headers
from nanoslime.types import RunError

Bound = list[tuple[Piece, torch.Tensor]]
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_LOCAL_EXPERT = re.compile(r"experts\.local_experts\.(\d+)\.")
_GROUPED_EXPERT = re.compile(r"experts\.(linear_fc[12]\.weight)(\d+)$")  # of Transformer Engine


def bind(model: GPTModel, shape: ModelShape, part: ModelPartition) -> Bound:
    """Each piece of the weight map that lies on this rank, with the parameter it belongs to.

    Every element of every parameter is in exactly one piece, padding of the vocabulary aside; anything else
    is a ValueError, since such a parameter would neither be loaded nor be sent.
    """
    parameters = _parameters(model, part.experts.start if part.experts else 0)
    bound: Bound = []
    covered: dict[str, int] = defaultdict(int)
    for piece in pieces(shape, part):
        name = piece.megatron if piece.megatron in parameters else piece.other
        if name not in parameters:
            raise ValueError(
                f"the model on this rank has no parameter {name}, where {piece.hf} belongs"
            )
        bound.append((piece, parameters[name]))
        covered[name] += parameters[name][piece.local].numel()
    for name, parameter in parameters.items():
        padded = name.startswith(("embedding.", "output_layer."))
        if covered[name] != parameter.numel() and not padded:
            filled = f"{covered[name]} of {parameter.numel()} elements of {name}"
            raise ValueError(f"the weight map fills {filled}")
    return bound


@torch.no_grad()
def load(bound: Bound, shape: ModelShape, directory: Path) -> None:
    """Reads this rank's rows from the checkpoint in `directory`; padding of the vocabulary becomes zero.

    Raises SafetensorsError for a missing or damaged file, ValueError for tensors that are missing, too many
    or of another shape. The headers of all files are checked before anything is read.
    """
    found = read_headers(directory)
    check_tensors(shape, {name: info.shape for name, info in found.items()}, str(directory))
    for _, parameter in bound:
        parameter.zero_()
    by_file: dict[Path, Bound] = defaultdict(list)
    for piece, parameter in bound:
        by_file[found[piece.hf].file].append((piece, parameter))
    for file, content in by_file.items():
        try:
            with safe_open(file, framework="pt") as opened:
                for piece, parameter in content:
                    parameter[piece.local] = opened.get_slice(piece.hf)[piece.box].to(parameter)
        except (SafetensorError, OSError) as e:
            raise ValueError(f"{file} cannot be read: {e}") from e
    if shape.tie_word_embeddings and "lm_head.weight" in found:
        _check_tied_head(bound, found["lm_head.weight"])


def freeze(model: GPTModel, bound: Bound, shape: ModelShape, patterns: Sequence[str]) -> None:
    """Takes what training.freeze names out of training, before DDP wraps the model.

    Raises RunError as frozen_names does, and where a tensor of Megatron's checkpoints would be so in part.
    """
    frozen = frozen_names(patterns, tensors(shape))
    saved_as = defaultdict[str, set[str]](set)
    for piece in pieces(shape):  # the experts of a layer are saved as one
        saved_as[re.sub(r"(experts\.experts)\.\d+", r"\1", piece.megatron)].add(piece.hf)
    for megatron, names in saved_as.items():
        if names & frozen and (left := sorted(names - frozen)):
            more = ", ".join(left[:4]) + " and so on" * (len(left) > 4)
            raise RunError(
                f"training.freeze selects a part of Megatron's {megatron}; freeze {more} as well"
            )
    for piece, parameter in bound:
        if piece.hf in frozen:
            parameter.requires_grad_(False)
    if model.pre_process and not model.embedding.word_embeddings.weight.requires_grad:
        # where nothing before them is trained, recomputed layers and pipeline stages would give no gradient
        model.embedding.register_forward_hook(
            lambda module, inputs, hidden: hidden.requires_grad_()
        )


def shards(bound: Bound, attribute: str = "data") -> Iterator[WeightShard]:
    """The pieces with views of the parameters, or of their float32 gradients for "main_grad"."""
    for piece, parameter in bound:
        if hasattr(parameter, attribute):  # the bias of a router's scores has no gradient
            values = getattr(parameter, attribute)[piece.local]
            yield WeightShard(piece.hf, piece.full_shape, piece.box, values)


def _check_tied_head(bound: Bound, head: TensorInfo) -> None:
    with safe_open(head.file, framework="pt") as opened:
        rows = opened.get_slice("lm_head.weight")
        for piece, parameter in bound:
            mine = parameter[piece.local]
            if piece.hf == "model.embed_tokens.weight" and not torch.equal(
                rows[piece.box].to(mine), mine
            ):
                problem = "lm_head.weight differs from the embedding, but config.json ties them"
                raise ValueError(f"{head.file}: {problem}; set tie_word_embeddings to false there")


def _parameters(model: GPTModel, first_expert: int) -> dict[str, torch.Tensor]:
    """Weights under the names of the weight map: layers and experts numbered over the whole model."""

    def whole(match: re.Match[str]) -> str:
        return f"decoder.layers.{model.decoder.layers[int(match[1])].layer_number - 1}."

    def rename(name: str) -> str:
        name = _LAYER.sub(whole, name, count=1)
        name = _LOCAL_EXPERT.sub(lambda m: f"experts.experts.{first_expert + int(m[1])}.", name)
        return _GROUPED_EXPERT.sub(
            lambda m: f"experts.experts.{first_expert + int(m[2])}.{m[1]}", name
        )

    biases = (item for item in model.named_buffers() if item[0].endswith(".router.expert_bias"))
    return {rename(name): tensor for name, tensor in (*model.named_parameters(), *biases)}
