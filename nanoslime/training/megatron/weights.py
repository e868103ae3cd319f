"""From Hugging Face weights to this rank's parameters, and back."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanoslime.batch import OwnedShard, WeightShard
from nanoslime.config.training import TrainingConfig
from nanoslime.models.checkpoint_files import read_tensors
from nanoslime.models.freezing import frozen_names
from nanoslime.models.rules import ModelPartition, Piece, pieces, tensors
from nanoslime.models.shape import ModelShape
from nanoslime.training.megatron.parallel import Place, partitions, place_of
from nanoslime.types import RunError

ParameterPieces = list[tuple[Piece, Tensor]]

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"(experts\.experts)\.\d+")
_LOCAL_EXPERT = re.compile(r"experts\.local_experts\.(\d+)\.")
# Transformer Engine numbers the experts of a rank at the end.
_GROUPED_EXPERT = re.compile(r"experts\.(linear_fc[12]\.weight)(\d+)$")
_NUM_SHOWN = 4  # names in a message


def bind(model: GPTModel, shape: ModelShape, partition: ModelPartition) -> ParameterPieces:
    """The pieces of the weight map in this model chunk, each with its parameter.

    Every element of every parameter is in exactly one piece, except padding of the
    vocabulary. A parameter with other elements raises ValueError, because they would
    neither be loaded nor be sent.
    """
    parameters = _parameters(model, partition.experts.start if partition.experts else 0)
    parameter_pieces: ParameterPieces = []
    num_covered: dict[str, int] = defaultdict(int)
    for piece in pieces(shape, partition):
        name = piece.megatron if piece.megatron in parameters else piece.local_spec_name
        if name not in parameters:
            raise ValueError(
                f"the model on this rank has no parameter {name}, where {piece.hf} belongs"
            )
        parameter = parameters[name]
        parameter_pieces.append((piece, parameter))
        num_covered[name] += parameter[piece.local].numel()
    for name, parameter in parameters.items():
        may_be_padded = name.startswith(("embedding.", "output_layer."))
        if num_covered[name] != parameter.numel() and not may_be_padded:
            raise ValueError(
                f"the weight map fills {num_covered[name]} of {parameter.numel()} elements"
                f" of {name}"
            )
    return parameter_pieces


@torch.no_grad()
def load(parameter_pieces: ParameterPieces, shape: ModelShape, directory: Path) -> None:
    """Reads this rank's rows from the checkpoint in `directory`.

    Padding of the vocabulary becomes zero. Raises RunError as read_tensors does, before
    anything is read, and ValueError for a file whose data cannot be read.
    """
    found = read_tensors(directory, shape)
    pieces_by_file: dict[Path, ParameterPieces] = defaultdict(list)
    for piece, parameter in parameter_pieces:
        parameter.zero_()
        pieces_by_file[found[piece.hf].file].append((piece, parameter))
    for file, pieces_of_file in pieces_by_file.items():
        try:
            with safe_open(file, framework="pt") as opened:
                for piece, parameter in pieces_of_file:
                    values = opened.get_slice(piece.hf)[piece.box]
                    parameter[piece.local] = values.to(parameter)
        except (SafetensorError, OSError) as e:
            raise ValueError(f"{file} cannot be read: {e}") from e


def freeze(
    model: GPTModel, parameter_pieces: ParameterPieces, shape: ModelShape, patterns: Sequence[str]
) -> None:
    """Takes the tensors that training.freeze names out of training.

    This comes before DDP wraps the model. Raises RunError as frozen_names does, and
    where only a part of a tensor of Megatron's checkpoints would be frozen.
    """
    frozen = frozen_names(patterns, tensors(shape))
    _check_frozen_whole(frozen, shape)
    for piece, parameter in parameter_pieces:
        if piece.hf in frozen:
            parameter.requires_grad_(False)
    if model.pre_process and not model.embedding.word_embeddings.weight.requires_grad:
        # Recomputed layers and pipeline stages give no gradient where nothing before
        # them is trained.
        model.embedding.register_forward_hook(_require_grad)


def shards(parameter_pieces: ParameterPieces) -> Iterator[WeightShard]:
    """The pieces, with views of the parameters."""
    for piece, parameter in parameter_pieces:
        yield WeightShard(piece.hf, piece.full_shape, piece.box, parameter.data[piece.local])


def owned_shards(
    shape: ModelShape, config: TrainingConfig, world_size: int
) -> list[list[OwnedShard]]:
    """What `shards` gives on each rank, in its order; no process group is needed."""
    by_place: dict[Place, list[OwnedShard]] = {}
    owned = []
    for rank in range(world_size):
        place = place_of(rank, world_size, config)
        if place not in by_place:
            by_place[place] = [
                OwnedShard(piece.hf, piece.full_shape, piece.box)
                for partition in partitions(place, config, shape)
                for piece in pieces(shape, partition)
            ]
        owned.append(by_place[place])
    return owned


def _check_frozen_whole(frozen: set[str], shape: ModelShape) -> None:
    """Raises RunError where `frozen` has only some tensors of a Megatron tensor."""
    hf_names: dict[str, set[str]] = defaultdict(set)
    for piece in pieces(shape):
        # The experts of a layer are saved as one tensor.
        saved_as = _EXPERT.sub(r"\1", piece.megatron)
        hf_names[saved_as].add(piece.hf)
    for megatron, names in hf_names.items():
        not_frozen = sorted(names - frozen)
        if not not_frozen or not names & frozen:
            continue
        shown = ", ".join(not_frozen[:_NUM_SHOWN])
        if len(not_frozen) > _NUM_SHOWN:
            shown += " and so on"
        raise RunError(
            f"training.freeze selects a part of Megatron's {megatron}; freeze {shown} as well"
        )


def _require_grad(module: torch.nn.Module, inputs: tuple[Tensor, ...], hidden: Tensor) -> Tensor:
    return hidden.requires_grad_()


def _parameters(model: GPTModel, first_expert: int) -> dict[str, Tensor]:
    """Weights by name in the weight map, which numbers layers and experts globally."""
    found = {}
    for name, parameter in model.named_parameters():
        found[_global_name(name, model, first_expert)] = parameter
    for name, buffer in model.named_buffers():
        if name.endswith(".router.expert_bias"):
            found[_global_name(name, model, first_expert)] = buffer
    return found


def _global_name(name: str, model: GPTModel, first_expert: int) -> str:
    """The name in the weight map of a parameter that this model chunk calls `name`."""
    layer = _LAYER.match(name)
    if layer:
        # Megatron's layer_number counts from 1, over all model chunks.
        layer_number = model.decoder.layers[int(layer[1])].layer_number
        name = f"decoder.layers.{layer_number - 1}.{name[layer.end() :]}"
    expert = _LOCAL_EXPERT.search(name)
    if expert:
        number = first_expert + int(expert[1])
        name = f"{name[: expert.start()]}experts.experts.{number}.{name[expert.end() :]}"
    expert = _GROUPED_EXPERT.search(name)
    if expert:
        number = first_expert + int(expert[2])
        name = f"{name[: expert.start()]}experts.experts.{number}.{expert[1]}"
    return name
