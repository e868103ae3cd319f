"""What a trainer rank holds: bytes of weights, gradients, optimizer state and saved activations.

Activations are counted by torch.autograd.graph.saved_tensors_hooks: each storage that some
backward function waits with counts once, as long as one of them does, and weights not at all.
What recomputation makes anew within a backward pass counts too.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from nanoslime.algorithms.policy_gradient import PolicyGradient
from nanoslime.batch import TrainBatch
from nanoslime.training.backend import TrainBackend

Shapes = Counter[tuple[str, tuple[int, ...], str]]


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes that one rank held."""

    weights: int
    gradients: int
    optimizer: int
    # The most that backward functions held at once.
    activations: int
    # How often a storage of a shape and dtype was saved first, and by which function.
    shapes: Shapes = field(default_factory=Counter)

    @property
    def parts(self) -> dict[str, int]:
        names = ("weights", "gradients", "optimizer", "activations")
        return {name: getattr(self, name) for name in names}


class SavedTensors:
    """Counts the bytes of storages that are saved for a backward pass, but for weights."""

    def __init__(self, weights: Callable[[], Iterable[Tensor]]) -> None:
        self._weights = weights
        self._users: Counter[int] = Counter()
        self._sizes: dict[int, int] = {}
        self._bytes = 0
        self.peak = 0
        self.shapes: Shapes = Counter()

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Inside, what is saved counts."""
        saved = self

        class Recomputation(_RECOMPUTATION):  # type: ignore[misc, valid-type]
            """What a non-reentrant checkpoint saves anew, which hides it from other hooks."""

            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments)
                self._held: list[_Saved] = []
                self.pack_hook = _both(saved.pack, self.pack_hook, self._held)

            def __exit__(self, *arguments: Any) -> None:
                super().__exit__(*arguments)
                # They count in the peak, and this object lives until the collector finds it.
                self._held.clear()

        torch.utils.checkpoint._recomputation_hook = Recomputation
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.pack, _unpack):
                yield
        finally:
            torch.utils.checkpoint._recomputation_hook = _RECOMPUTATION

    def pack(self, tensor: Tensor) -> _Saved:
        storage = tensor.untyped_storage()
        key = storage._cdata
        num_bytes = 0 if self._is_weight(tensor) else storage.nbytes()
        self._users[key] += 1
        if self._users[key] == 1:
            self._sizes[key] = num_bytes
            self._bytes += num_bytes
            self.peak = max(self.peak, self._bytes)
            if num_bytes:
                self.shapes[(str(tensor.dtype), tuple(tensor.shape), _maker(tensor))] += 1
        return _Saved(self, key, tensor)

    def drop(self, key: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            self._bytes -= self._sizes.pop(key)
            del self._users[key]

    def _is_weight(self, tensor: Tensor) -> bool:
        address = tensor.untyped_storage().data_ptr()
        for weight in self._weights():
            local = weight.to_local() if hasattr(weight, "to_local") else weight
            if local.untyped_storage().data_ptr() == address:
                return True
        return False


_RECOMPUTATION: Any = torch.utils.checkpoint._recomputation_hook


class _Saved:
    """A saved tensor, until its backward function is done with it."""

    def __init__(self, owner: SavedTensors, key: int, tensor: Tensor) -> None:
        self._owner = owner
        self._key = key
        self.tensor = tensor

    def __del__(self) -> None:
        self._owner.drop(self._key)


def _both(
    count: Callable[[Tensor], _Saved], keep: Callable[[Tensor], Any], held: list[_Saved]
) -> Callable[[Tensor], Any]:
    def pack(tensor: Tensor) -> Any:
        held.append(count(tensor))
        return keep(tensor)

    return pack


def _unpack(saved: _Saved) -> Tensor:
    return saved.tensor


def _maker(tensor: Tensor) -> str:
    return type(tensor.grad_fn).__name__ if tensor.grad_fn is not None else "-"


def held_by_a_step(backend: TrainBackend, batch: TrainBatch, algorithm: PolicyGradient) -> Held:
    """Makes a train step and says what the rank held."""
    module = getattr(backend, "_policy", None)
    modules = [module] if module is not None else backend._model_chunks

    def weights() -> Iterator[Tensor]:
        for one in modules:
            yield from one.parameters()

    gc.collect()
    saved = SavedTensors(weights)
    with saved.counted():
        backend.train_step(batch, algorithm)
    if hasattr(backend, "_policy"):
        gradients = backend._grads()
    else:
        gradients = [p.main_grad for chunk in modules for p in chunk.parameters()]
    own = backend._parameters()
    kept, _ = backend._live_tensors()
    states = _num_bytes(kept) - _num_bytes([*own, *_buffers(modules)])
    return Held(_num_bytes(own), _num_bytes(gradients), states, saved.peak, saved.shapes)


def _buffers(modules: Iterable[Any]) -> list[Tensor]:
    return [buffer for module in modules for buffer in module.buffers()]


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of `tensors`, each once."""
    sizes = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())
