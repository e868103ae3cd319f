"""Stands in for the sgl-kernel package on machines without CUDA; on the engine's PYTHONPATH only there.

SGLang 0.5.23 with SGLANG_USE_CPU_ENGINE=1 imports the *_cpu names of sgl_kernel unconditionally, but the
wheels hold CUDA objects only. Its layers take their PyTorch paths as long as torch.ops.sgl_kernel is empty,
so that the names have to exist and are not called, but for the one below.
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
    """Cache slots of each request: the next piece of out_cache_loc into req_to_token[request, start:end]."""
    lengths = (end_offset - start_offset).tolist()
    rows = zip(
        req_pool_indices.tolist(), start_offset.tolist(), out_cache_loc.split(lengths), strict=True
    )
    for row, start, slots in rows:
        req_to_token[row, start : start + len(slots)] = slots.to(req_to_token.dtype)


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: object, **kwargs: object) -> None:
        raise NotImplementedError(f"sgl_kernel.{name} does not exist on a machine without CUDA")

    return missing
