"""Sampling in this process with transformers, without a server.

Requests that arrive together are one batch: left-padded prompts, one forward per token
for all of them, with a KV cache. The engine is not fast (a finished sequence stays in
the batch until the last one ends), but its logprobs are exact.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from nanoslime.engine_kind import EngineStart
from nanoslime.models.shape import ModelShape
from nanoslime.rollout.weight_check import ExpectedTensors
from nanoslime.storage.safetensors_file import read_headers
from nanoslime.types import GenerateRequest, Generation, MemoryPart, RunError, Status

# The most sequences in one forward.
_MAX_SEQUENCES = 1024
# How long a batch or a weight update may take before whoever waits for it gives up.
_DEADLINE_S = 300.0


class EmbeddedOwner:
    """Makes the engine of a run in this process; it ends with the process."""

    def __init__(self, start: EngineStart) -> None:
        self._start = start

    def start(self, deadline_s: float) -> EmbeddedEngine:
        config = self._start.config
        device = "cpu"
        if self._start.device == "cuda":
            device = f"cuda:{self._start.gpu_ids[0]}"
        return EmbeddedEngine(
            str(self._start.model_dir),
            config.model.dtype,
            device,
            seed=config.seed,
            trust_remote_code=config.model.trust_remote_code,
        )

    def close(self) -> None:
        """Nothing is left to end."""


@dataclass(eq=False, slots=True)
class _Job:
    """A request that waits for its batch."""

    request: GenerateRequest
    answer: list[Generation] | None = None


class EmbeddedEngine:
    """An `Engine` in this process. A lock with a deadline keeps updates and forwards apart."""

    name = "embedded"

    def __init__(
        self,
        model_path: str,
        dtype: str,
        device: str,
        seed: int,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        """`seed` is for requests without one of their own."""
        self._model_path = model_path
        self._trusts_code = trust_remote_code
        self._expected = ExpectedTensors.of_checkpoint(model_path)
        self._model = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
        )
        self._model.to(device).eval()
        shape = ModelShape.read(model_path)
        self._context_length = shape.context_length
        self._experts = ExpertRecorder(self._model, shape)
        self._seeds = torch.Generator().manual_seed(seed)
        self._version = 0
        self._paused = False
        self._busy = threading.Lock()
        self._waiting: list[_Job] = []
        self._released_shapes: list[torch.Size] = []

    async def generate(self, request: GenerateRequest) -> list[Generation]:
        """`request.n` continuations. A prompt that leaves no room for a token gets status error.

        Raises RunError for a token id outside the vocabulary.
        """
        request.check_tokens(self._model.config.get_text_config().vocab_size, self.name)
        job = _Job(request)
        self._waiting.append(job)
        try:
            # Requests that were started together with this one join its batch here.
            await asyncio.sleep(0)
            while self._paused:
                await asyncio.sleep(0.01)
            # The first one to wake up answers for all.
            if job.answer is None:
                self._answer([job for job in self._waiting if job.answer is None])
        finally:
            self._waiting.remove(job)
        assert job.answer is not None
        return job.answer

    def health(self) -> bool:
        """It lives as long as this process does."""
        return True

    def pause(self) -> None:
        """Returns when no forward runs; requests wait until `resume`."""
        self._paused = True
        with self._alone("the running batch"):
            pass

    def resume(self) -> None:
        self._paused = False

    def flush(self) -> None:
        """Nothing needs to be done: a cache ends with its batch."""

    def policy_version(self) -> int:
        return self._version

    def update_weights_from_disk(self, path: str, version: int) -> None:
        """`load_weights` from the safetensors of a directory."""
        files = {info.file for info in read_headers(Path(path)).values()}
        self.load_weights(_tensors_of(sorted(files)), version)

    def load_weights(self, named: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy tensors, under the names of the checkpoint, into the model.

        Raises RunError, with the weights as they were, for unknown, repeated and
        missing names and other shapes.
        """
        pairs = list(named)
        tensors = dict(pairs)
        shapes = [(name, tuple(tensor.shape)) for name, tensor in pairs]
        problem = self._expected.first_problem(shapes) or self._expected.missing(tensors)
        if problem:
            raise RunError(f"engine {self.name} refused version {version}: {problem}")
        trained = {name: tensors[name] for name in self._expected.required}
        with self._alone("the running batch"):
            self._copy(trained)
            self._version = version

    def release_memory(self) -> None:
        with self._alone("the running batch"):
            for parameter in self._model.parameters():
                self._released_shapes.append(parameter.shape)
                parameter.data = parameter.data.new_empty(0)

    def resume_memory(self, part: MemoryPart) -> None:
        if part == "cache":
            return  # the next batch makes its own
        for parameter, shape in zip(self._model.parameters(), self._released_shapes, strict=True):
            parameter.data = parameter.data.new_empty(shape)
        self._released_shapes.clear()

    @contextmanager
    def _alone(self, other: str) -> Iterator[None]:
        """Inside, no forward and no weight update of another thread runs; `other` is awaited."""
        if not self._busy.acquire(timeout=_DEADLINE_S):
            raise RunError(f"engine {self.name}: waited {_DEADLINE_S:g} s for {other} to end")
        try:
            yield
        finally:
            self._busy.release()

    def _copy(self, tensors: dict[str, Tensor]) -> None:
        model = self._model
        parameters = dict(model.named_parameters(remove_duplicate=False))
        if not tensors.keys() <= parameters.keys():
            # transformers 5 holds the experts of a layer in one tensor, under another
            # name; a fresh model translates the names of the checkpoint.
            fresh = type(model).from_pretrained(
                None, state_dict=tensors, config=model.config, dtype=model.dtype
            )
            tensors = dict(fresh.named_parameters())
            parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, tensor in tensors.items():
                parameters[name].copy_(tensor)

    def _answer(self, jobs: Sequence[_Job]) -> None:
        sequences_of = {job: self._sequences(job.request) for job in jobs}
        running = [
            sequence
            for sequences in sequences_of.values()
            for sequence in sequences
            if sequence.max_tokens > 0
        ]
        with self._alone("a weight update"):
            for first in range(0, len(running), _MAX_SEQUENCES):
                batch = running[first : first + _MAX_SEQUENCES]
                _sample(self._model, batch, self._experts)
            for job, sequences in sequences_of.items():
                job.answer = [sequence.generation(self._version) for sequence in sequences]

    def _sequences(self, request: GenerateRequest) -> list[_Sequence]:
        """The `request.n` sequences of a request, before their first token."""
        seed = request.seed
        if seed is None:
            seed = int(torch.randint(2**62, (), generator=self._seeds))
        room = self._context_length - len(request.token_ids)
        max_tokens = max(0, min(request.max_new_tokens, room))
        generator = torch.Generator().manual_seed(seed)
        randoms = torch.rand(request.n, max_tokens, dtype=torch.float64, generator=generator)
        stop_ids = frozenset(request.stop_token_ids) | self._eos_ids()
        texts = _StopTexts(request.stop, self._tokenizer) if request.stop else None
        return [_Sequence(request, max_tokens, stop_ids, texts, row) for row in randoms]

    @cached_property
    def _tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self._model_path, trust_remote_code=self._trusts_code)

    def _eos_ids(self) -> frozenset[int]:
        """The tokens that end a response by the model's generation config."""
        generation_config = self._model.generation_config
        eos = generation_config.eos_token_id if generation_config else None
        if eos is None:
            return frozenset()
        return frozenset([eos] if isinstance(eos, int) else eos)


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


class _StopTexts:
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
class _Sequence:
    """One sequence that is being sampled."""

    request: GenerateRequest
    # max_new_tokens, or fewer where the model's context ends.
    max_tokens: int
    stop_ids: frozenset[int]
    stop_texts: _StopTexts | None
    # float64 [max_tokens] in [0, 1): its own, so that other sequences do not change its
    # samples.
    randoms: Tensor
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    # [tokens, num_moe_layers, topk] of each forward.
    experts: list[Tensor] = field(default_factory=list)
    stopped: bool = False

    def append(self, token: int, logprob: float) -> None:
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        ends = self.stop_texts is not None and self.stop_texts.end(self.token_ids)
        self.stopped = ends or token in self.stop_ids

    @property
    def done(self) -> bool:
        return self.stopped or len(self.token_ids) == self.max_tokens

    def generation(self, version: int) -> Generation:
        if self.max_tokens == 0:
            error = f"a prompt of {len(self.request.token_ids)} tokens fills the model's context"
            return Generation([], [], Status.ERROR, [], error=error)
        return Generation(
            token_ids=self.token_ids,
            logprobs=self.logprobs,
            status=Status.COMPLETED if self.stopped else Status.TRUNCATED,
            versions=[(0, version)],
            routed_experts=torch.cat(self.experts).numpy() if self.experts else None,
        )


@torch.inference_mode()
def _sample(
    model: PreTrainedModel, sequences: Sequence[_Sequence], experts: ExpertRecorder
) -> None:
    """Fills in the tokens, logprobs and experts of the sequences, one token of each per
    forward."""
    device = model.device
    prompts = [torch.tensor(sequence.request.token_ids) for sequence in sequences]
    attended = [torch.ones_like(prompt) for prompt in prompts]
    tokens = pad_sequence(prompts, batch_first=True, padding_side="left").to(device)  # [B, P]
    mask = pad_sequence(attended, batch_first=True, padding_side="left").to(device)  # [B, P]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    randoms = pad_sequence([sequence.randoms for sequence in sequences], batch_first=True)
    randoms = randoms.to(device)  # [B, the largest max_tokens]
    temperatures = torch.tensor([s.request.temperature for s in sequences], device=device)
    cache = None
    for step in range(randoms.shape[1]):
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
        _keep_tokens(sequences, chosen, logprobs.gather(1, chosen))
        if all(sequence.done for sequence in sequences):
            return
        tokens = chosen
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(chosen)], 1)


def _keep_experts(sequences: Sequence[_Sequence], experts: Tensor | None) -> None:
    """Gives each running sequence its own of `experts` [B, P or 1, num_moe_layers, topk]."""
    if experts is None:
        return
    for sequence, own in zip(sequences, experts, strict=True):
        if not sequence.done:
            # The first forward has the prompt, after the padding on its left; later
            # ones one token.
            sequence.experts.append(own[-len(sequence.request.token_ids) :])


def _keep_tokens(sequences: Sequence[_Sequence], chosen: Tensor, logprobs: Tensor) -> None:
    """Gives each running sequence its token of `chosen` [B, 1] and its logprob [B, 1]."""
    token_of = chosen[:, 0].tolist()
    logprob_of = logprobs[:, 0].tolist()
    for sequence, token, logprob in zip(sequences, token_of, logprob_of, strict=True):
        if not sequence.done:
            sequence.append(token, logprob)


def pick(probs: Tensor, randoms: Tensor) -> Tensor:
    """One token per row, by inverting the row's cumulative distribution.

    probs: [B, V], need not sum to one. randoms: [B] in [0, 1). Returns [B].
    """
    cumulative = probs.double().cumsum(-1)
    mass_below = randoms[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, mass_below, right=True)[:, 0]
    return chosen.clamp(max=probs.shape[-1] - 1)


def _filtered(logprobs: Tensor, sequences: Sequence[_Sequence]) -> Tensor:
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


def _tensors_of(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        yield from load_file(file).items()
