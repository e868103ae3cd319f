"""Attention within each sequence of a pack, without a mask of all tokens by all tokens.

An attention function for transformers (AttentionInterface), chosen by its name:

    half precision on CUDA: torch's variable-length flash attention, one call for the pack
    otherwise: one call of scaled_dot_product_attention per sequence

transformers would give its own functions a boolean mask [1, 1, T, T]. This one is told
where the sequences lie, and gets in the mask's place the size of a layer's sliding
window, if it has one.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from nanoslime.training.flash_attention import Pack, attend
from nanoslime.types import RunError

PACKED = "packed_sequences"


def choose_attention(model: PreTrainedModel) -> str:
    """Sets how `model` computes attention, and gives its name.

    It is PACKED for the models whose attention transformers hands to a function that
    gets no mask. Others keep a mask: with sdpa, or with their own code where logits are
    capped, which sdpa does not do. Raises RunError for models that do not keep the
    sequences of a pack apart: those with attention sinks, and those with a recurrent
    state.
    """
    if model._is_stateful or not model._supports_sdpa:
        raise RunError(
            f"{type(model).__name__} has layers that do not keep packed sequences apart"
            " (a recurrent state or attention sinks); the fsdp backend cannot train it"
        )
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    if capped:
        name = "eager"
    elif model._supports_attention_backend and model._supports_flash_attn:
        name = PACKED
    else:
        name = "sdpa"
    model.set_attn_implementation(name)
    return name


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: int | Tensor | None,
    *,
    scaling: float | None = None,
    packed_sequences: Pack | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention [1, T, Hq, D] of query [1, Hq, T, D], key and value [1, Hkv, T, D].

    `attention_mask` is what `_window_or_mask` gave. Raises RunError for a model that
    does more to the logits than scale them.
    """
    for name in ("position_bias", "s_aux", "softcap"):
        if options.get(name) is not None:
            raise RunError(
                f"{type(module).__name__} gives its attention {name}, which the fsdp backend"
                " does not compute; this model cannot be trained with --backend fsdp"
            )
    if packed_sequences is None or isinstance(attention_mask, Tensor):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
    # [1, heads, T, d] -> [T, heads, d]
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    attended = attend(query, key, value, packed_sequences, scale=scaling, window=attention_mask)
    return attended[None], None


def _window_or_mask(
    *, local_size: int | None = None, use_vmap: bool = False, **options: Any
) -> int | Tensor | None:
    """What a layer's attention gets as its mask.

    None stands for causal attention and an int for a causal window of so many tokens.
    A pattern of the model's own (`use_vmap`) stays a mask [1, 1, T, T].
    """
    if use_vmap:
        return sdpa_mask(local_size=local_size, use_vmap=True, **options)
    return local_size


AttentionInterface.register(PACKED, _attend)
AttentionMaskInterface.register(PACKED, _window_or_mask)
