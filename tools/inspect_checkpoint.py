"""Say what a checkpoint is: format, model, sizes, dtypes, training state; --tensors lists every tensor.

    python tools/inspect_checkpoint.py DIR [--tensors]

Reads headers only, except with --verify, which compares the checksums of the manifest.
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from pathlib import Path

from tools.conversion import keys, torch_dist
from tools.conversion.checkpoint import open_checkpoint, torch_dist_directory
from tools.conversion.command import finish, notes


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("directory", type=Path, metavar="DIR")
    add("--hf-checkpoint", type=Path, metavar="DIR", help="the model, for Megatron without hf/")
    add("--tensors", action="store_true", help="list every tensor: name, dtype, shape, chunks")
    add("--verify", action="store_true", help="compare the checksums of its manifest")
    arguments = parser.parse_args(argv)
    data = torch_dist_directory(arguments.directory) if arguments.directory.is_dir() else None
    if data:
        print("\n".join(_training_state(data)))
    checkpoint = open_checkpoint(
        arguments.directory, arguments.hf_checkpoint, verify=arguments.verify
    )
    shape, rows = checkpoint.shape, checkpoint.tensors.items()
    dtypes = Counter({dtype: 0 for dtype in sorted({t.dtype for _, t in rows})})
    for _, tensor in rows:
        dtypes[tensor.dtype] += tensor.num_bytes
    print(f"weights   {checkpoint.format}: {len(rows)} tensors, {checkpoint.num_bytes:,} bytes")
    print("dtypes    " + ", ".join(f"{dtype} {count:,} bytes" for dtype, count in dtypes.items()))
    print(
        f"model     {shape.model_type}, {shape.num_parameters:,} parameters, {shape.num_layers} layers"
    )
    print(f"          hidden size {shape.hidden_size}, vocabulary {shape.vocab_size}")
    if moe := shape.moe:
        print(f"          {moe.num_experts} experts, {moe.num_experts_per_token} a token")
    print(f"          multi-token prediction: {'yes' if checkpoint.mtp else 'no'}")
    compared = "compared, good" if arguments.verify else "not compared"
    print(f"checksums {compared if checkpoint.manifest else 'none'}")
    for line in notes(checkpoint):
        print(line)
    if arguments.tensors:
        width = max(len(name) for name, _ in rows)
        for name, t in rows:
            where = f"{len(t.chunks)} in {t.chunks[0].file.name}"
            print(f"{name:{width}}  {t.dtype:4}  {str(list(t.shape)):20}  {where}")
    return 0


def _training_state(data: Path) -> list[str]:
    """What a torch_dist directory holds beside the weights."""
    tensors, objects = torch_dist.read(data)
    weights = [key for key in tensors if keys.is_weight(key)]
    common = torch_dist.read_common(data)
    others = sum(tensor.num_bytes for key, tensor in tensors.items() if not keys.is_weight(key))
    lines = [f"torch_dist {data}, layout {keys.layout(weights)}"]
    lines.append(
        f"state     {len(tensors) - len(weights)} tensors besides the weights, {others:,} bytes"
    )
    lines.append(f"          {len(objects)} objects; common: {', '.join(sorted(map(str, common)))}")
    if "iteration" in common or "step" in common:
        lines.append(f"iteration {common.get('iteration', common.get('step'))}")
    return lines


if __name__ == "__main__":
    sys.exit(finish("inspect_checkpoint", lambda: main(sys.argv[1:])))
