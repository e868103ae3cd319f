"""Say what a checkpoint is: format, model, sizes, dtypes, training state; --tensors lists
every tensor.

    python tools/inspect_checkpoint.py DIR [--tensors]

It reads headers only, except with --verify, which compares the checksums of the manifest.
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from pathlib import Path

from tools.conversion import keys, torch_dist
from tools.conversion.checkpoint import Checkpoint, open_checkpoint, torch_dist_directory
from tools.conversion.command import finish, notes


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument(
        "--hf-checkpoint",
        type=Path,
        metavar="DIR",
        help="the model, for a Megatron checkpoint without hf/",
    )
    parser.add_argument(
        "--tensors", action="store_true", help="list every tensor: name, dtype, shape, chunks"
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare the checksums of its manifest"
    )
    arguments = parser.parse_args(argv)
    if arguments.directory.is_dir():
        data_dir = torch_dist_directory(arguments.directory)
        if data_dir is not None:
            # It is said even where the model is not known or its weights are refused.
            print("\n".join(_training_state(data_dir)))
    checkpoint = open_checkpoint(
        arguments.directory, arguments.hf_checkpoint, verify=arguments.verify
    )
    lines = _weights(checkpoint)
    lines += _model(checkpoint)
    lines.append(_checksums(checkpoint, arguments.verify))
    lines += notes(checkpoint)
    if arguments.tensors:
        lines += _tensor_table(checkpoint)
    print("\n".join(lines))
    return 0


def _training_state(data_dir: Path) -> list[str]:
    """What a torch_dist directory holds beside the weights."""
    contents = torch_dist.read(data_dir)
    common = contents.read_common()
    weights = []
    num_others = 0
    other_bytes = 0
    for key, tensor in contents.tensors.items():
        if keys.is_weight(key):
            weights.append(key)
        else:
            num_others += 1
            other_bytes += tensor.num_bytes
    common_names = ", ".join(sorted(map(str, common)))
    lines = [
        f"torch_dist {data_dir}, layout {keys.layout(weights)}",
        f"state     {num_others} tensors besides the weights, {other_bytes:,} bytes",
        f"          {len(contents.objects)} objects; common: {common_names}",
    ]
    iteration = common.get("iteration", common.get("step"))
    if iteration is not None:
        lines.append(f"iteration {iteration}")
    return lines


def _weights(checkpoint: Checkpoint) -> list[str]:
    bytes_by_dtype: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        bytes_by_dtype[tensor.dtype] += tensor.num_bytes
    dtypes = [f"{dtype} {count:,} bytes" for dtype, count in sorted(bytes_by_dtype.items())]
    return [
        f"weights   {checkpoint.format}: {len(checkpoint.tensors)} tensors, "
        f"{checkpoint.num_bytes:,} bytes",
        "dtypes    " + ", ".join(dtypes),
    ]


def _model(checkpoint: Checkpoint) -> list[str]:
    shape = checkpoint.shape
    lines = [
        f"model     {shape.model_type}, {shape.num_parameters:,} parameters, "
        f"{shape.num_layers} layers",
        f"          hidden size {shape.hidden_size}, vocabulary {shape.vocab_size}",
    ]
    if shape.moe:
        lines.append(
            f"          {shape.moe.num_experts} experts, {shape.moe.num_experts_per_token} a token"
        )
    lines.append(f"          multi-token prediction: {'yes' if checkpoint.mtp else 'no'}")
    return lines


def _checksums(checkpoint: Checkpoint, verified: bool) -> str:
    if checkpoint.manifest_dir is None:
        return "checksums none"
    if verified:
        return "checksums compared, good"
    return "checksums not compared"


def _tensor_table(checkpoint: Checkpoint) -> list[str]:
    width = max(len(name) for name in checkpoint.tensors)
    lines = []
    for name, tensor in checkpoint.tensors.items():
        place = f"{len(tensor.chunks)} in {tensor.chunks[0].file.name}"
        lines.append(f"{name:{width}}  {tensor.dtype:4}  {str(list(tensor.shape)):20}  {place}")
    return lines


if __name__ == "__main__":
    sys.exit(finish("inspect_checkpoint", lambda: main(sys.argv[1:])))
