"""Compare two checkpoints, of either format, bit for bit through the weight map.

    python tools/verify_checkpoint.py A B             every tensor of A is the tensor of B
    python tools/verify_checkpoint.py A B --logits    both compute the same, in float32 on the CPU

--logits computes Hugging Face checkpoints with transformers and Megatron's with megatron-core's own GPTModel,
on random tokens; it needs the whole model in memory, as float32. Exit code: 0 equal, 1 different, 2 refused.
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
from tools.conversion.command import bar, finish, notes, summary
from tools.conversion.tensor_copy import Progress, fill, same

_LOGITS = "tools.conversion.logits:logits"  # torch, transformers and megatron-core
_SHOWN = 20


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add, how_far = (
        parser.add_argument,
        "of the largest logit, that the largest difference may be (%(default)s)",
    )
    add("a", type=Path, metavar="A")
    add("b", type=Path, metavar="B")
    add("--hf-checkpoint", type=Path, metavar="DIR", help="the model, for Megatron without hf/")
    add("--logits", action="store_true", help="compare what both compute, not their bits")
    add("--tokens", type=int, default=64, help="of the random sequence (%(default)s)")
    add("--tolerance", type=float, default=1e-4, help=how_far)
    arguments = parser.parse_args(argv)
    a, b = (open_checkpoint(path, arguments.hf_checkpoint) for path in (arguments.a, arguments.b))
    if a.shape.model_type != b.shape.model_type:
        raise RunError(f"{a.path} is a {a.shape.model_type}, {b.path} a {b.shape.model_type}")
    for line in {**dict.fromkeys(notes(a)), **dict.fromkeys(notes(b))}:
        print(line, file=sys.stderr)
    if arguments.logits:
        return compare_logits(a, b, arguments.tokens, arguments.tolerance)
    return compare_bits(a, b)


def compare_bits(a: Checkpoint, b: Checkpoint) -> int:
    """Prints every tensor that differs; 1 if there is one."""
    started, of_a, of_b = time.monotonic(), a.huggingface(), b.huggingface()
    own = {
        piece.hf for checkpoint in (a, b) for piece in checkpoint.pieces()
    }  # a repeat may be in one alone
    names = sorted(own | (of_a.keys() & of_b.keys()))
    with bar(a.num_bytes) as progress, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = list(
            pool.map(lambda name: difference(of_a.get(name), of_b.get(name), progress), names)
        )
    wrong = [f"{name}: {why}" for name, why in zip(names, found, strict=True) if why]
    for line in wrong[:_SHOWN]:
        print(line)
    if len(wrong) > _SHOWN:
        print(f"... and {len(wrong) - _SHOWN} more")
    told = f"{len(names)} tensors, {summary(a.num_bytes, time.monotonic() - started)}"
    print(f"DIFFERENT: {len(wrong)} of {told}" if wrong else f"equal, bit for bit: {told}")
    return 1 if wrong else 0


def difference(a: Tensor | None, b: Tensor | None, progress: Progress) -> str:
    """In what two tensors differ; empty if in nothing."""
    if a is None or b is None:
        return f"only in {'B' if a is None else 'A'}"
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return f"{a.dtype} {list(a.shape)} in A, {b.dtype} {list(b.shape)} in B"
    one, other = (fill("", t.dtype, (0,) * len(t.shape), t.shape, t.links) for t in (a, b))
    equal = same(one, other)
    progress(one.num_bytes)
    return "" if equal else f"other values ({a.dtype} {list(a.shape)})"


def compare_logits(a: Checkpoint, b: Checkpoint, num_tokens: int, tolerance: float) -> int:
    """Prints the largest difference of the logits; 1 if it is too large."""
    compute = resolve(_LOGITS, {}, "logits")
    by_a, by_b = compute(a, num_tokens), compute(b, num_tokens)
    gap, largest = float((by_a - by_b).abs().max()), float(by_a.abs().max())
    verdict = "same logits" if gap <= tolerance * largest else "DIFFERENT LOGITS"
    print(
        f"{verdict}: max |difference| {gap:.3e}, max |logit| {largest:.3e}, {list(by_a.shape)} in float32"
    )
    return 0 if gap <= tolerance * largest else 1


if __name__ == "__main__":
    sys.exit(finish("verify_checkpoint", lambda: main(sys.argv[1:])))
