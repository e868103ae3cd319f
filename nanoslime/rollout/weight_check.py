"""Whether the tensors of a weight update are those of the checkpoint that an engine was started from."""

from collections.abc import Collection, Iterable
from pathlib import Path

from nanoslime.storage.safetensors_file import read_headers

Shapes = dict[str, tuple[int, ...]]
Named = tuple[str, tuple[int, ...]]  # a tensor's name and shape


def checkpoint_shapes(path: str) -> Shapes:
    """Name -> shape of every tensor in a directory's safetensors. Raises OSError, ValueError, RunError."""
    return {name: info.shape for name, info in read_headers(Path(path)).items()}


def first_problem(
    received: Iterable[Named], expected: Shapes, seen: Collection[str] = ()
) -> str | None:
    """The first tensor that is unknown, came before (also in `seen`) or has another shape; None: no such."""
    names = set(seen)
    for name, shape in received:
        if name not in expected:
            return (
                f"unknown tensor {name!r}; the engine's checkpoint has {sorted(expected)[:3]} ..."
            )
        if name in names:
            return f"tensor {name!r} came twice"
        if shape != expected[name]:
            return f"tensor {name!r} has shape {list(shape)}, the engine's checkpoint {list(expected[name])}"
        names.add(name)
    return None


def missing(expected: Shapes, received: Iterable[str]) -> str | None:
    left = sorted(set(expected) - set(received))
    return (
        f"{len(left)} of {len(expected)} tensors missing: {', '.join(left[:5])}" if left else None
    )
