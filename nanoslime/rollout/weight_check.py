"""Whether the tensors of a weight update are the trained tensors of the model that an
engine was started from, and whether the engine's own parameters are made of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nanoslime.models.rules import FLOAT32, Shapes, is_computed, optional_tensors, tensors
from nanoslime.models.shape import ModelShape
from nanoslime.sealed_bucket import checksum
from nanoslime.storage.safetensors_file import read_headers
from nanoslime.types import TensorKind

# The name and the shape of a tensor.
Named = tuple[str, tuple[int, ...]]

_MAX_NAMES = 5
# Elements that are looked at together: an engine's cache leaves little memory.
_NUM_AT_A_TIME = 1 << 24


def checkpoint_shapes(path: str) -> Shapes:
    """Name -> shape of every tensor in a directory's safetensors that is not computed.

    Raises OSError, ValueError or RunError for a directory that cannot be read.
    """
    headers = read_headers(Path(path))
    return {name: info.shape for name, info in headers.items() if not is_computed(name)}


@dataclass(frozen=True, slots=True)
class ExpectedTensors:
    """What an update of a model has to bring, and what it may bring beside.

    Trainers send what the weight map has, whatever the files hold: `optional` are repeats
    (a tied output layer) and the layers of multi-token prediction, which nobody trains.
    """

    required: Shapes
    optional: Shapes

    @classmethod
    def of_checkpoint(cls, path: str) -> ExpectedTensors:
        """The tensors of the model in `path`. Raises RunError as ModelShape.read does."""
        shape = ModelShape.read(path)
        return cls(tensors(shape), optional_tensors(shape))

    def first_problem(self, received: Iterable[Named], seen: Collection[str] = ()) -> str | None:
        """Names the first tensor that is unknown, came before (also in `seen`) or has
        another shape.

        Returns None where there is no such tensor.
        """
        names = set(seen)
        for name, shape in received:
            expected = self.required.get(name) or self.optional.get(name)
            if expected is None:
                examples = sorted(self.required)[:3]
                return f"unknown tensor {name!r}; the engine's checkpoint has {examples} ..."
            if name in names:
                return f"tensor {name!r} came twice"
            if shape != expected:
                return (
                    f"tensor {name!r} has shape {list(shape)}, the engine's checkpoint "
                    f"{list(expected)}"
                )
            names.add(name)
        return None

    def disagreement(self, sent: Sequence[TensorKind], model: torch.nn.Module) -> str | None:
        """What keeps a trainer that sends these tensors from an engine that has loaded `model`;
        None where nothing does.

        The engine's dtype is the narrowest that it has: some keep a few parameters in float32.
        Engines divide or join other tensors, and hold each norm as it is; by them a model is found
        that was loaded with other sizes than its config.json has, or with fewer layers.
        """
        problem = self.first_problem((name, tuple(shape)) for name, _, shape in sent)
        problem = problem or self.missing(name for name, _, _ in sent)
        if problem:
            return problem
        own = str(min(model.parameters(), key=lambda parameter: parameter.itemsize).dtype)
        loaded = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
        for name, dtype, shape in sent:
            if dtype != own and not name.endswith(FLOAT32):
                return f"tensor {name!r} is sent as {dtype}, and the engine was loaded as {own}"
            is_norm = name in self.required and name.endswith("norm.weight")
            if is_norm and loaded.get(name) != list(shape):
                found = loaded.get(name, "no such tensor")
                return f"tensor {name!r} has shape {list(shape)}, and the engine loaded {found}"
        return None

    def missing(self, received: Iterable[str]) -> str | None:
        """Counts and names the required tensors that never came; None where all did."""
        left = sorted(self.required.keys() - set(received))
        return _listed(left, f"of {len(self.required)} tensors missing")


@torch.no_grad()
def empty(model: torch.nn.Module) -> None:
    """Makes every parameter NaN, so that what an update leaves out is seen; see `left_empty`."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.fill_(torch.nan)


@torch.no_grad()
def left_empty(model: torch.nn.Module) -> str | None:
    """Counts and names the parameters with NaN after an update; None where there are none."""
    left = []
    for name, parameter in model.named_parameters():
        parts = parameter.flatten().split(_NUM_AT_A_TIME)
        if any(bool(part.isnan().any()) for part in parts):
            left.append(name)
    return _listed(left, "parameters of the engine are NaN after the update")


@torch.no_grad()
def fingerprints(model: torch.nn.Module) -> dict[str, list[int]]:
    """A checksum of every parameter, by name."""
    found = {}
    for name, parameter in model.named_parameters():
        data = parameter.detach().contiguous().reshape(-1).view(torch.uint8)
        found[name] = checksum(data).tolist()
    return found


def changed(model: torch.nn.Module, before: dict[str, list[int]]) -> str | None:
    """Counts and names the parameters that are not what they were; None where all are."""
    now = fingerprints(model)
    names = [name for name in before if now.get(name) != before[name]]
    return _listed(names, "parameters of the engine were not what the trainer has")


def _listed(names: list[str], problem: str) -> str | None:
    if not names:
        return None
    return f"{len(names)} {problem}: {', '.join(names[:_MAX_NAMES])}"
