"""Compare two checkpoints, of either format, bit for bit through the weight map.

    python tools/verify_checkpoint.py A B             every tensor of A is the tensor of B
    python tools/verify_checkpoint.py A B --logits    both compute the same, in float32 on the CPU

--logits computes Hugging Face checkpoints with transformers and Megatron's with
megatron-core's own GPTModel, on random tokens; it needs the whole model in memory, as
float32. Exit code: 0 equal, 1 different, 2 refused.
"""

import os
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nanoslime.plugins import resolve
from nanoslime.types import RunError
from tools.conversion.checkpoint import Checkpoint, Tensor, open_checkpoint
from tools.conversion.command import finish, notes, progress_bar, summary
from tools.conversion.tensor_copy import Fill, Progress, fill, same

_LOGITS = "tools.conversion.logits:logits"  # imports torch, transformers and megatron-core
_MAX_SHOWN = 20


def main(argv: list[str]) -> int:
    arguments = _make_parser().parse_args(argv)
    a = open_checkpoint(arguments.a, arguments.hf_checkpoint)
    b = open_checkpoint(arguments.b, arguments.hf_checkpoint)
    if a.shape.model_type != b.shape.model_type:
        raise RunError(
            f"{a.path} is a {a.shape.model_type}, {b.path} a {b.shape.model_type}; "
            "give two checkpoints of one model"
        )
    notes_of_both = dict.fromkeys(notes(a) + notes(b))
    for note in notes_of_both:
        print(note, file=sys.stderr)
    if arguments.logits:
        return compare_logits(a, b, arguments.tokens, arguments.tolerance)
    return compare_bits(a, b)


def _make_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, metavar="A")
    parser.add_argument("b", type=Path, metavar="B")
    parser.add_argument(
        "--hf-checkpoint",
        type=Path,
        metavar="DIR",
        help="the model, for a Megatron checkpoint without hf/",
    )
    parser.add_argument(
        "--logits", action="store_true", help="compare what both compute, not their bits"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=64,
        help="number of tokens in the random sequence (%(default)s)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="the largest difference allowed, relative to the largest logit (%(default)s)",
    )
    return parser


def compare_bits(a: Checkpoint, b: Checkpoint) -> int:
    """Prints every tensor that differs; returns 1 if there is one."""
    started = time.monotonic()
    tensors_a = a.huggingface()
    tensors_b = b.huggingface()
    names = {piece.hf for piece in a.pieces() + b.pieces()}
    # A file may hold a repeat of a tensor or not, so repeats count only where both have
    # one.
    names |= tensors_a.keys() & tensors_b.keys()
    ordered = sorted(names)
    num_threads = min(8, os.cpu_count() or 1)
    with progress_bar(a.num_bytes) as progress, ThreadPoolExecutor(num_threads) as pool:

        def compare(name: str) -> str | None:
            return difference(tensors_a.get(name), tensors_b.get(name), progress)

        differences = list(pool.map(compare, ordered))
    different = []
    for name, found in zip(ordered, differences, strict=True):
        if found is not None:
            different.append(f"{name}: {found}")
    for line in different[:_MAX_SHOWN]:
        print(line)
    if len(different) > _MAX_SHOWN:
        print(f"... and {len(different) - _MAX_SHOWN} more")
    total = f"{len(ordered)} tensors, {summary(a.num_bytes, time.monotonic() - started)}"
    if different:
        print(f"DIFFERENT: {len(different)} of {total}")
        return 1
    print(f"equal, bit for bit: {total}")
    return 0


def difference(a: Tensor | None, b: Tensor | None, progress: Progress) -> str | None:
    """How two tensors differ; None if they do not."""
    if a is None:
        return "only in B"
    if b is None:
        return "only in A"
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return f"{a.dtype} {list(a.shape)} in A, {b.dtype} {list(b.shape)} in B"
    contents_a = _all_of(a)
    equal = same(contents_a, _all_of(b))
    progress(contents_a.num_bytes)
    if equal:
        return None
    return f"other values ({a.dtype} {list(a.shape)})"


def _all_of(tensor: Tensor) -> Fill:
    origin = (0,) * len(tensor.shape)
    return fill("", tensor.dtype, origin, tensor.shape, tensor.links)


def compare_logits(a: Checkpoint, b: Checkpoint, num_tokens: int, tolerance: float) -> int:
    """Prints the largest difference of the logits; returns 1 if it is too large."""
    compute_logits = resolve(_LOGITS, {}, "logits")
    logits_a = compute_logits(a, num_tokens)
    logits_b = compute_logits(b, num_tokens)
    gap = float((logits_a - logits_b).abs().max())
    largest = float(logits_a.abs().max())
    equal = gap <= tolerance * largest
    verdict = "same logits" if equal else "DIFFERENT LOGITS"
    print(
        f"{verdict}: max |difference| {gap:.3e}, max |logit| {largest:.3e}, "
        f"{list(logits_a.shape)} in float32"
    )
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(finish("verify_checkpoint", lambda: main(sys.argv[1:])))
