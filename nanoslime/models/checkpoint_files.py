"""The tensors of a model's Hugging Face files, checked against its config.json.

Submission, trainers and the converter all read a checkpoint through this file, so that
they take and refuse the same ones, for the same reason. Torch-free.
"""

from pathlib import Path

from nanoslime.models.rules import check_tensors, is_computed
from nanoslime.models.shape import ModelShape
from nanoslime.storage.safetensors_file import (
    INDEX_FILE,
    SINGLE_FILE,
    TensorInfo,
    read_headers,
    same_content,
)
from nanoslime.types import RunError

_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")

# The last part of a tensor's name in quantized files (GPTQ, AWQ, FP8, compressed-tensors,
# bitsandbytes), beside or in place of `weight`.
_QUANTIZED = set(
    """qweight qzeros scales g_idx weight_scale weight_scale_2 weight_scale_inv weight_packed
    weight_zero_point input_scale k_scale v_scale absmax quant_map SCB""".split()
)


def read_tensors(directory: Path, shape: ModelShape) -> dict[str, TensorInfo]:
    """Where each tensor of the model lies: all that it has, and nothing else.

    Repeats and multi-token prediction are there where the files hold them. Raises RunError
    as float_tensors does, and, naming file and tensor, for a tensor that is missing,
    unknown or of another shape, and for a tied output layer that differs.
    """
    found = float_tensors(directory)
    listing = directory / INDEX_FILE
    if not listing.exists():
        listing = directory / SINGLE_FILE
    shapes = {name: info.shape for name, info in found.items()}
    files = {name: str(info.file) for name, info in found.items()}
    check_tensors(shape, shapes, str(listing), files)
    if shape.tie_word_embeddings:
        check_tied_head(found)
    return found


def float_tensors(directory: Path) -> dict[str, TensorInfo]:
    """The tensors in a directory's files, without those that are computed.

    Raises RunError for files that are missing or damaged, and for quantized weights.
    """
    headers = read_headers(directory)
    for name, info in headers.items():
        if name.rpartition(".")[2] in _QUANTIZED:
            raise RunError(
                f"{info.file}: {name} belongs to quantized weights, which are not supported; "
                "dequantize the checkpoint first"
            )
        if info.dtype not in _FLOAT_DTYPES:
            raise RunError(f"{info.file}: {name} is {info.dtype}; dequantize the checkpoint first")
    return {name: info for name, info in headers.items() if not is_computed(name)}


def check_tied_head(tensors: dict[str, TensorInfo]) -> None:
    """Raises RunError where the files hold another output layer than the embedding.

    transformers would then not tie them, SGLang and Megatron would.
    """
    head = tensors.get("lm_head.weight")
    if head is not None and not same_content(head, tensors["model.embed_tokens.weight"]):
        raise RunError(
            f"{head.file}: lm_head.weight has to repeat model.embed_tokens.weight, but differs, "
            "although config.json ties them; set tie_word_embeddings to false there, or remove "
            "lm_head.weight from the files"
        )
