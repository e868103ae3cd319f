"""torch's flash attention, one call for all sequences of a pack, and what stands in for it."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

# The widest head; the width is a multiple of 8.
_MAX_HEAD_DIM = 256
# torch 2.11 computes grouped heads without being asked to.
_ASKS_FOR_GROUPED_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters


@dataclass(frozen=True, slots=True)
class Pack:
    """Where sequences lie on one token axis, end to end."""

    lengths: list[int]  # tokens of each sequence
    cu_seqlens: Tensor  # int32 [S+1], on the device of the attention


def _suits(query: Tensor, value: Tensor) -> bool:
    """Whether there is a kernel for these: half precision on CUDA, and a width that it takes."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    head_dim = query.shape[-1]
    fits = value.shape[-1] <= head_dim <= _MAX_HEAD_DIM and head_dim % 8 == 0
    return query.is_cuda and half and fits


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pack: Pack,
    *,
    scale: float | None,
    window: int | None = None,
) -> Tensor:
    """Causal attention [T, heads, v] within each sequence, on any device and in any dtype.

    query [T, heads, d], key [T, groups, d], value [T, groups, v]. With a `window` a
    token sees itself and the window - 1 before it. scale=None is d ** -0.5.
    """
    if not _suits(query, value):
        mask_of = partial(_window_mask, window=window)
        lengths = (pack.lengths, pack.lengths)
        return attend_each(query, key, value, lengths, mask_of, scale=scale)
    longest = max(pack.lengths)
    value_dim = value.shape[-1]
    if value_dim < query.shape[-1]:  # latent attention
        value = F.pad(value, [0, query.shape[-1] - value_dim])
    tokens_before = -1 if window is None else window - 1
    attended = varlen_attn(
        query,
        key,
        value,
        pack.cu_seqlens,
        pack.cu_seqlens,
        longest,
        longest,
        scale=scale,
        window_size=(tokens_before, 0),
        **({"enable_gqa": True} if _ASKS_FOR_GROUPED_HEADS else {}),
    )
    return attended[..., :value_dim]


def attend_each(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[Sequence[int], Sequence[int]],
    mask_of: Callable[[Tensor], Tensor | None],
    *,
    scale: float | None,
) -> Tensor:
    """Attention [T, heads, v] of one sequence after the other.

    query [T, heads, d], key [K, groups, d], value [K, groups, v]; `lengths` of the sequences in
    queries and in keys. It is causal unless the mask of a sequence's key, bool [L, K_i], says
    what each of its L queries sees.
    """
    query_lengths, key_lengths = lengths
    outputs = []
    for q, k, v in zip(
        query.split(query_lengths), key.split(key_lengths), value.split(key_lengths), strict=True
    ):
        outputs.append(_attend_one(q, k, v, mask_of(k), scale))
    return torch.cat(outputs)


def _window_mask(key: Tensor, window: int | None) -> Tensor | None:
    """bool [L, L]: a token sees itself and the window - 1 before it; None if it sees all."""
    length = len(key)
    if window is None or length <= window:
        return None
    positions = torch.arange(length, device=key.device)
    distance = positions[:, None] - positions
    return (distance >= 0) & (distance < window)


def _attend_one(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Attention [L, heads, v] of one sequence."""
    num_groups = key.shape[1]
    if query.is_cuda and num_groups < query.shape[1]:
        # The kernels for float32 and for masks know no grouped heads.
        repeats = query.shape[1] // num_groups
        key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    attended = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],  # [1, heads, L, d]
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended[0].transpose(0, 1)
