"""Samples a batch of sequences token by token, with a model of transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from nanoslime.models.shape import ModelShape
from nanoslime.types import GenerateRequest, Generation, Status


class ExpertRecorder:
    """Keeps the experts that each layer with experts chose in the last forward."""

    def __init__(self, model: nn.Module, shape: ModelShape) -> None:
        self._by_layer: list[Tensor] = []
        if shape.moe is None:
            return
        self._dtype = torch.uint8 if shape.moe.num_experts <= 256 else torch.int16
        for layer in shape.moe_layers:
            experts = model.get_submodule(f"model.layers.{layer}.mlp.experts")
            experts.register_forward_pre_hook(self._record)

    def _record(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """A hook before the experts of a layer, which get (hidden states, chosen experts, ...)."""
        chosen: Tensor = arguments[1]
        self._by_layer.append(chosen.to(self._dtype))

    def clear(self) -> None:
        self._by_layer.clear()

    def of_sequences(self, num_sequences: int) -> Tensor | None:
        """The experts of the last forward: [B, tokens, num_moe_layers, topk], or None."""
        if not self._by_layer:
            return None
        # Each layer gave [B * tokens, topk].
        return torch.stack(self._by_layer, dim=1).unflatten(0, (num_sequences, -1)).cpu()


class StopTexts:
    """Texts that end a response. As SGLang does, it looks for them in the last tokens: one
    more than the longest text has."""

    def __init__(self, texts: Sequence[str], tokenizer: Any) -> None:
        self._texts = texts
        self._tokenizer = tokenizer
        lengths = [len(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        self._num_tokens = max(lengths) + 1

    def end(self, token_ids: list[int]) -> bool:
        tail = self._tokenizer.decode(token_ids[-self._num_tokens :])
        return any(text in tail for text in self._texts)


@dataclass(slots=True)
class Sampled:
    """One sequence that is being sampled."""

    request: GenerateRequest
    # max_new_tokens, or fewer where the model's context ends.
    max_tokens: int
    stop_ids: frozenset[int]
    stop_texts: StopTexts | None
    # float64 [max_tokens] in [0, 1): its own, so that other sequences do not change its
    # samples.
    randoms: Tensor
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    # (first token, version) spans, as in Generation.
    versions: list[tuple[int, int]] = field(default_factory=list)
    # [tokens, num_moe_layers, topk] of each forward.
    experts: list[Tensor] = field(default_factory=list)
    stopped: bool = False

    @property
    def all_token_ids(self) -> list[int]:
        return [*self.request.token_ids, *self.token_ids]

    def append(self, token: int, logprob: float, version: int) -> None:
        if not self.versions or self.versions[-1][1] != version:
            self.versions.append((len(self.token_ids), version))
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        ends = self.stop_texts is not None and self.stop_texts.end(self.token_ids)
        self.stopped = ends or token in self.stop_ids

    @property
    def done(self) -> bool:
        return self.stopped or len(self.token_ids) == self.max_tokens

    def generation(self, aborted: bool) -> Generation:
        if self.max_tokens == 0:
            error = f"a prompt of {len(self.request.token_ids)} tokens fills the model's context"
            return Generation([], [], Status.ERROR, [], error=error)
        status = Status.COMPLETED if self.stopped else Status.TRUNCATED
        if aborted and not self.done:
            status = Status.ABORTED
        return Generation(
            token_ids=self.token_ids,
            logprobs=self.logprobs,
            status=status,
            versions=self.versions,
            routed_experts=torch.cat(self.experts).numpy() if self.experts else None,
        )


@torch.inference_mode()
def sample_batch(
    model: PreTrainedModel,
    sequences: Sequence[Sampled],
    experts: ExpertRecorder,
    version: int,
    is_over: Callable[[], bool],
) -> None:
    """Fills in the tokens, logprobs and experts of the sequences, one token of each per
    forward, until all are done or `is_over` says so.

    A sequence that has been stopped goes on from its tokens.
    """
    device = model.device
    prompts = [torch.tensor(sequence.all_token_ids) for sequence in sequences]
    attended = [torch.ones_like(prompt) for prompt in prompts]
    tokens = pad_sequence(prompts, batch_first=True, padding_side="left").to(device)  # [B, P]
    mask = pad_sequence(attended, batch_first=True, padding_side="left").to(device)  # [B, P]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    remaining = [sequence.randoms[len(sequence.token_ids) :] for sequence in sequences]
    randoms = pad_sequence(remaining, batch_first=True).to(device)  # [B, most tokens to come]
    temperatures = torch.tensor([s.request.temperature for s in sequences], device=device)
    cache = None
    for step in range(randoms.shape[1]):
        if is_over():
            return
        experts.clear()
        output = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        _keep_experts(sequences, experts.of_sequences(len(sequences)))
        logits = output.logits[:, -1].float()
        logprobs = torch.log_softmax(logits / temperatures[:, None], -1)  # [B, V]
        probs = _filtered(logprobs, sequences)
        chosen = pick(probs, randoms[:, step])[:, None]  # [B, 1]
        _keep_tokens(sequences, chosen, logprobs.gather(1, chosen), version)
        if all(sequence.done for sequence in sequences):
            return
        tokens = chosen
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(chosen)], 1)


def _keep_experts(sequences: Sequence[Sampled], experts: Tensor | None) -> None:
    """Gives each running sequence its own of `experts` [B, P or 1, num_moe_layers, topk]."""
    if experts is None:
        return
    for sequence, own in zip(sequences, experts, strict=True):
        if sequence.done:
            continue
        if len(own) > 1:
            # A first forward has more than the last token, after the padding on its left.
            num_known = sum(len(part) for part in sequence.experts)
            own = own[num_known - len(sequence.all_token_ids) :]
        sequence.experts.append(own)


def _keep_tokens(
    sequences: Sequence[Sampled], chosen: Tensor, logprobs: Tensor, version: int
) -> None:
    """Gives each running sequence its token of `chosen` [B, 1] and its logprob [B, 1]."""
    token_of = chosen[:, 0].tolist()
    logprob_of = logprobs[:, 0].tolist()
    for sequence, token, logprob in zip(sequences, token_of, logprob_of, strict=True):
        if not sequence.done:
            sequence.append(token, logprob, version)


def pick(probs: Tensor, randoms: Tensor) -> Tensor:
    """One token per row, by inverting the row's cumulative distribution.

    probs: [B, V], need not sum to one. randoms: [B] in [0, 1). Returns [B].
    """
    cumulative = probs.double().cumsum(-1)
    mass_below = randoms[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, mass_below, right=True)[:, 0]
    return chosen.clamp(max=probs.shape[-1] - 1)


def _filtered(logprobs: Tensor, sequences: Sequence[Sampled]) -> Tensor:
    """Probabilities [B, V], not normalised: zero outside the top k and the top p of each row."""
    requests = [sequence.request for sequence in sequences]
    probs = logprobs.exp()
    if all(request.top_p == 1.0 and request.top_k <= 0 for request in requests):
        return probs
    vocab_size = probs.shape[-1]
    rank = torch.arange(vocab_size, device=probs.device)
    top_k = [request.top_k if request.top_k > 0 else vocab_size for request in requests]
    top_k = torch.tensor(top_k, device=probs.device)[:, None]  # [B, 1]
    top_p = torch.tensor([request.top_p for request in requests], device=probs.device)[:, None]
    ordered, order = probs.sort(-1, descending=True)
    mass_before = ordered.cumsum(-1) - ordered
    beyond_top_k = rank >= top_k
    beyond_top_p = (mass_before >= top_p) & (top_p < 1.0)
    dropped_of_order = beyond_top_k | beyond_top_p
    dropped = torch.zeros_like(dropped_of_order).scatter(1, order, dropped_of_order)
    return probs.masked_fill(dropped, 0.0)
