"""megatron-core 0.19.2 on a machine without CUDA.

Everything here does nothing where CUDA is available.

megatron-core names the CUDA device in some hundred places. `install` gives its modules
a stand-in for their global name `torch` that turns the CUDA device into the CPU; torch
itself stays as it is for everybody else. The names that this stand-in cannot reach are
changed inside a `with cuda_names():` block.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import (
    async_utils,
    filesystem_async,
    state_dict_saver,
)
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe import token_dispatcher

_CPU = torch.device("cpu")

# megatron-core's own save loads these modules only while it runs. They are imported
# here, so that `install` finds them.
LOADED_BY_A_SAVE = (async_utils, filesystem_async, state_dict_saver)


class _Stream:
    """Stands in for torch.cuda.Stream and Event: on the CPU everything runs in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, *args: Any) -> _Stream:
        return self


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wraps a tensor factory so that it takes a CUDA device for the CPU."""

    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return make


def _all_gather(
    outputs: list[torch.Tensor], tensor: torch.Tensor, group: dist.ProcessGroup
) -> None:
    """all_gather of tensors of any sizes, as NCCL has it; gloo's takes those of one size only.

    Ranks that share an expert have different numbers of its tokens.
    """
    sizes = {output.shape for output in outputs}
    if len(sizes) == 1:
        dist.all_gather(outputs, tensor, group=group)
        return
    outputs[group.rank()].copy_(tensor)
    for source, output in enumerate(outputs):
        dist.broadcast(output, group=group, group_src=source)


def _nothing(*args: Any) -> None: ...


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


def _stand_in(real: ModuleType, **changes: Any) -> ModuleType:
    """A module in which some names of `real` are others; it has all else from `real`."""
    module = ModuleType(real.__name__)
    vars(module).update(changes, __getattr__=partial(getattr, real))
    return module


# torch as megatron-core sees it: device and random generator are the CPU's.
_CUDA = _stand_in(
    torch.cuda,
    Stream=_Stream,
    Event=_Stream,
    current_device=lambda: _CPU,
    current_stream=_Stream,
    default_stream=_Stream,
    get_rng_state=_get_rng_state,
    manual_seed=torch.manual_seed,
    set_device=_nothing,
    stream=nullcontext,
    synchronize=_nothing,
)
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange")
_TORCH = _stand_in(
    torch,
    cuda=_CUDA,
    distributed=_stand_in(dist, all_gather=_all_gather),
    **{name: _on_cpu(getattr(torch, name)) for name in _FACTORIES},
)


def install() -> None:
    """Gives every megatron module loaded so far the stand-in.

    Call it again after loading more of them.
    """
    if torch.cuda.is_available():
        return
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and vars(module).get("torch") is torch:
            module.torch = _TORCH  # type: ignore[attr-defined]
    # The tracker of model-parallel random states reaches the CUDA generators through
    # torch._C.
    megatron_random._get_cuda_rng_state = _get_rng_state
    megatron_random._set_cuda_rng_state = _set_rng_state
    token_dispatcher.maybe_move_tensor_to_cpu = _to_cpu


def _to_cpu(tensor: Any, as_numpy: bool = False, **_: Any) -> Any:
    """Makes an array of a CPU tensor too: megatron-core splits by it wherever it came from."""
    if as_numpy and torch.is_tensor(tensor):
        return tensor.numpy()
    return tensor


@contextmanager
def cuda_names() -> Iterator[None]:
    """Inside, Tensor.cuda() stays on the CPU, and Tensor.type() says cuda.

    megatron-core needs it to build models and optimizers: language_module.py moves a
    tied output layer by .cuda(); the optimizers sort parameters by param.type() ==
    "torch.cuda.FloatTensor".
    """
    if torch.cuda.is_available():
        yield
        return
    plain_type = torch.Tensor.type
    plain_cuda = torch.Tensor.cuda

    def cuda_type(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = plain_type(tensor, *args, **kwargs)
        if isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    def stay(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return tensor

    torch.Tensor.type = cuda_type
    torch.Tensor.cuda = stay
    try:
        yield
    finally:
        torch.Tensor.type = plain_type
        torch.Tensor.cuda = plain_cuda
