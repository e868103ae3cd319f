"""megatron-core 0.16.1 on a machine without CUDA. Everything here does nothing where CUDA is available.

megatron-core names the CUDA device in some hundred places. `install` gives its modules a stand-in for their
global name `torch` that turns those into the CPU; torch itself stays as it is for everybody else. What
cannot be reached by that name is changed for the time of a `with cuda_names():` block.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils, token_dispatcher

_CPU = torch.device("cpu")


class _Stream:
    """Stands in for torch.cuda.Stream and Event: on the CPU everything is in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, *args: Any) -> _Stream:
        return self


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return make


class _Cuda(ModuleType):
    """torch.cuda as megatron-core may see it: the device is the CPU, its generator the CPU's."""

    Stream = Event = _Stream
    current_device = staticmethod(lambda: _CPU)
    set_device = staticmethod(lambda *args: None)
    synchronize = staticmethod(lambda *args: None)
    current_stream = default_stream = staticmethod(lambda *args: _Stream())
    stream = staticmethod(lambda stream: nullcontext())
    get_rng_state = staticmethod(lambda *args, **kwargs: torch.get_rng_state())
    manual_seed = staticmethod(torch.manual_seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _Distributed(ModuleType):
    """torch.distributed as megatron-core may see it: gloo gathers tensors of one size only, NCCL of any.

    Ranks that share an expert have different numbers of its tokens.
    """

    @staticmethod
    def all_gather(
        parts: list[torch.Tensor], tensor: torch.Tensor, group: dist.ProcessGroup
    ) -> None:
        if len({part.shape for part in parts}) == 1:
            dist.all_gather(parts, tensor, group=group)
            return
        parts[group.rank()].copy_(tensor)
        for source, part in enumerate(parts):
            dist.broadcast(part, group=group, group_src=source)

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)


class _Torch(ModuleType):
    """torch as megatron-core may see it."""

    cuda, distributed = _Cuda("torch.cuda"), _Distributed("torch.distributed")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


_TORCH = _Torch("torch")
for _name in ("tensor", "zeros", "ones", "empty", "full", "arange"):
    setattr(_TORCH, _name, _on_cpu(getattr(torch, _name)))


def install() -> None:
    """Gives every megatron module loaded so far the stand-in. Call it again after loading more of them."""
    if torch.cuda.is_available():
        return
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and vars(module).get("torch") is torch:
            module.torch = _TORCH  # type: ignore[attr-defined]
    # the tracker of model-parallel random states reaches the CUDA generators through torch._C
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # without Transformer Engine 0.16.1 does not define the one, and takes it to be there in the other
    moe_utils.te_general_gemm, multi_latent_attention.HAVE_TE = None, False
    token_dispatcher.maybe_move_tensor_to_cpu = _to_cpu


def _to_cpu(tensor: Any, as_numpy: bool = False, **_: Any) -> Any:
    """megatron-core's makes an array of a CUDA tensor only, but then splits by it wherever it came from."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


@contextmanager
def cuda_names() -> Iterator[None]:
    """While megatron-core builds model or optimizer: Tensor.cuda() stays on the CPU, Tensor.type() says cuda.

    language_module.py moves a tied output layer by .cuda(); the optimizers sort parameters by
    param.type() == "torch.cuda.FloatTensor".
    """
    if torch.cuda.is_available():
        yield
        return
    plain = torch.Tensor.type, torch.Tensor.cuda

    def cuda_type(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = plain[0](tensor, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    torch.Tensor.type, torch.Tensor.cuda = cuda_type, lambda tensor, *args, **kwargs: tensor
    try:
        yield
    finally:
        torch.Tensor.type, torch.Tensor.cuda = plain
