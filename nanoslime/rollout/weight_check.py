"""Whether the tensors of a weight update are the tensors of the checkpoint that an
engine was started from."""

from collections.abc import Collection, Iterable
from pathlib import Path

from nanoslime.storage.safetensors_file import read_headers

Shapes = dict[str, tuple[int, ...]]
# The name and the shape of a tensor.
Named = tuple[str, tuple[int, ...]]

_MAX_NAMES = 5


def checkpoint_shapes(path: str) -> Shapes:
    """Name -> shape of every tensor in a directory's safetensors.

    Raises OSError, ValueError or RunError for a directory that cannot be read.
    """
    return {name: info.shape for name, info in read_headers(Path(path)).items()}


def first_problem(
    received: Iterable[Named], expected: Shapes, seen: Collection[str] = ()
) -> str | None:
    """Names the first tensor that is unknown, came before (also in `seen`) or has
    another shape.

    Returns None where there is no such tensor.
    """
    names = set(seen)
    for name, shape in received:
        if name not in expected:
            examples = sorted(expected)[:3]
            return f"unknown tensor {name!r}; the engine's checkpoint has {examples} ..."
        if name in names:
            return f"tensor {name!r} came twice"
        if shape != expected[name]:
            return (
                f"tensor {name!r} has shape {list(shape)}, the engine's checkpoint "
                f"{list(expected[name])}"
            )
        names.add(name)
    return None


def missing(expected: Shapes, received: Iterable[str]) -> str | None:
    """Counts and names the tensors that never came; None where all did."""
    left = sorted(set(expected) - set(received))
    if not left:
        return None
    return f"{len(left)} of {len(expected)} tensors missing: {', '.join(left[:_MAX_NAMES])}"
