"""Stands in for the sgl-kernel package in the engine's processes on a machine without
CUDA.

SGLang 0.5.23 with SGLANG_USE_CPU_ENGINE=1 imports the *_cpu names of sgl_kernel
unconditionally, but the wheels hold CUDA objects only. Its layers take their PyTorch
paths as long as torch.ops.sgl_kernel is empty: the names have to exist, and only the
one below is called.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def assign_req_to_token_pool_cpu(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    out_cache_loc: Tensor,
    pool_len: int,
) -> None:
    """Writes the new cache slots of each request to req_to_token[request, start:end].

    `out_cache_loc` holds the slots of all requests, one request after the other.
    """
    requests = req_pool_indices.tolist()
    starts = start_offset.tolist()
    lengths = (end_offset - start_offset).tolist()
    slots_by_request = out_cache_loc.split(lengths)
    for request, start, slots in zip(requests, starts, slots_by_request, strict=True):
        req_to_token[request, start : start + len(slots)] = slots.to(req_to_token.dtype)


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: object, **kwargs: object) -> None:
        raise NotImplementedError(f"sgl_kernel.{name} does not exist on a machine without CUDA")

    return missing
