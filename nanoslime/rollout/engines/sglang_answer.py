"""Reads what SGLang answers to /generate.

Where an answer has routed experts, nearly all of it is their base64 text: it is taken out first,
and never becomes a Python string.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from pybase64 import b64decode

from nanoslime.models.shape import ModelShape, MoE
from nanoslime.types import GenerateRequest, Generation, Status

_STATUS = {"stop": Status.COMPLETED, "length": Status.TRUNCATED, "abort": Status.ABORTED}
# What stands before the experts' text. Within a JSON string, quotation marks are escaped.
_EXPERTS = re.compile(rb'"routed_experts"\s*:\s*"')


@dataclass(frozen=True, slots=True)
class Asked:
    """What an answer has to fit."""

    request: GenerateRequest
    vocab_size: int
    # The model, where the server reports the experts of each token.
    experts_of: ModelShape | None


def read_generations(content: bytes, asked: Asked) -> list[Generation]:
    """The generations of an answer.

    Raises ValueError, LookupError, TypeError or AttributeError where it is something else.
    """
    texts: list[memoryview] = []
    if asked.experts_of is not None:
        content, texts = _without_experts(content)
    answer = orjson.loads(content)
    answers = answer if isinstance(answer, list) else [answer]
    if len(answers) != asked.request.n:
        raise ValueError(f"{len(answers)} of {asked.request.n} samples")
    return [_generation(item, asked, texts) for item in answers]


def _without_experts(content: bytes) -> tuple[bytes, list[memoryview]]:
    """The JSON with a number in place of each text of experts, and these texts by number."""
    view = memoryview(content)
    parts: list[bytes | memoryview] = []
    texts: list[memoryview] = []
    end = 0
    while (found := _EXPERTS.search(content, end)) is not None:
        first = found.end()
        parts += [view[end:first], b"%d" % len(texts)]
        end = content.index(b'"', first)
        texts.append(view[first:end])
    parts.append(view[end:])
    return b"".join(parts), texts


def _generation(
    answer: dict[str, Any], asked: Asked, experts_texts: Sequence[memoryview]
) -> Generation:
    meta = answer["meta_info"]
    token_ids = answer["output_ids"]
    logprobs = [entry[0] for entry in meta["output_token_logprobs"]]
    _check(token_ids, logprobs, asked)
    spans = meta.get("weight_versions") or [{"version": meta["weight_version"], "start": 0}]
    versions = [(int(span["start"]), int(span["version"])) for span in spans if token_ids]
    starts = [start for start, _ in versions]
    if token_ids and (starts[0] != 0 or sorted(starts) != starts):
        raise ValueError(f"versions that are not in order from the first token on: {versions[:8]}")
    finish_reason = meta["finish_reason"]
    status = _STATUS[finish_reason["type"]]
    if not token_ids and status is not Status.ABORTED:
        raise ValueError("no token")
    experts = None
    # A request that was ended while it waited has none.
    has_experts = status is not Status.ABORTED or "routed_experts" in meta
    shape = asked.experts_of
    if token_ids and has_experts and shape is not None and shape.moe is not None:
        text = experts_texts[int(meta["routed_experts"])]
        num_rows = len(asked.request.token_ids) + len(token_ids) - 1
        experts = _routed_experts(text, num_rows, shape, shape.moe)
    return Generation(
        token_ids=token_ids,
        logprobs=logprobs,
        status=status,
        versions=versions,
        error=finish_reason.get("message"),
        routed_experts=experts,
    )


def _check(token_ids: list[Any], logprobs: list[Any], asked: Asked) -> None:
    """Raises ValueError or TypeError for what are no tokens with a logprob each."""
    if len(logprobs) != len(token_ids):
        raise ValueError(f"{len(token_ids)} tokens, {len(logprobs)} logprobs")
    if len(token_ids) > asked.request.max_new_tokens:
        raise ValueError(f"{len(token_ids)} tokens, {asked.request.max_new_tokens} were asked for")
    if not token_ids:
        return
    tokens = np.array(token_ids)
    if tokens.dtype.kind != "i" or tokens.ndim != 1:
        raise ValueError(f"token ids that are no list of integers: {token_ids[:8]}")
    if tokens.min() < 0 or tokens.max() >= asked.vocab_size:
        raise ValueError(f"a token outside the vocabulary of {asked.vocab_size}")
    if not np.isfinite(np.array(logprobs)).all():
        raise ValueError("a logprob that is not finite")


def _routed_experts(text: memoryview, num_rows: int, shape: ModelShape, moe: MoE) -> np.ndarray:
    """The experts of each token but the last [num_rows, num_moe_layers, topk], as in `Sample`.

    SGLang reports every layer, also those without experts: as int32, or by our plug-in as uint8.
    """
    values = b64decode(text, validate=True)
    sizes = (num_rows, shape.num_layers, moe.num_experts_per_token)
    sent_as = np.uint8 if len(values) == math.prod(sizes) else np.int32
    dtype = np.uint8 if moe.num_experts <= 256 else np.int16
    of_layers = np.frombuffer(values, sent_as).astype(dtype, copy=False).reshape(sizes)
    if len(shape.moe_layers) < shape.num_layers:
        of_layers = of_layers[:, list(shape.moe_layers)]
    return of_layers
