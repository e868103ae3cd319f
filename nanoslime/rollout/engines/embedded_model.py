"""Sampling in this process with transformers, without a server.

Requests that arrive together are one batch: left-padded prompts, one forward per token
for all of them, with a KV cache, in a thread of the engine's own. The engine is not fast
(a finished sequence stays in the batch until the last one ends), but its logprobs are
exact. A batch can be stopped between two tokens; what it has sampled stays.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
from nanoslime.types import (
    GenerateRequest,
    Generation,
    MemoryPart,
    PauseMode,
    RunError,
    Status,
)

# The most sequences in one forward.
_MAX_SEQUENCES = 1024
# A batch begins when no request has come in so many turns of the event loop.
_QUIET_TURNS = 8
# How long a batch or a weight update may take before whoever waits for it gives up.
_DEADLINE_S = 300.0


class EmbeddedOwner:
    """Makes the engine of a run in this process; it ends with the process."""

    def __init__(self, start: EngineStart) -> None:
        self._start = start
        self._engine: EmbeddedEngine | None = None

    def start(self, deadline_s: float) -> EmbeddedEngine:
        config = self._start.config
        device = "cpu"
        if self._start.device == "cuda":
            device = f"cuda:{self._start.gpu_ids[0]}"
        self._engine = EmbeddedEngine(
            str(self._start.model_dir),
            config.model.dtype,
            device,
            seed=config.seed,
            trust_remote_code=config.model.trust_remote_code,
        )
        return self._engine

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()


@dataclass(eq=False, slots=True)
class _Job:
    """A request with what has been sampled of it. A request that is given up is cancelled."""

    sequences: list[_Sequence]
    answer: Future[list[Generation]] = field(default_factory=Future)

    def finish(self, *, aborted: bool = False) -> None:
        if self.answer.set_running_or_notify_cancel():
            self.answer.set_result([sequence.generation(aborted) for sequence in self.sequences])

    def fail(self, error: BaseException) -> None:
        if self.answer.set_running_or_notify_cancel():
            self.answer.set_exception(error)


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
        _compute_logits_in_float32(self._model)
        shape = ModelShape.read(model_path)
        self._context_length = shape.context_length
        self._experts = ExpertRecorder(self._model, shape)
        self._seeds = torch.Generator().manual_seed(seed)
        self._version = 0
        self._paused = False
        # Whoever holds it computes: a batch, or a change of the weights.
        self._busy = threading.Lock()
        # Stops the running batch before its next token, and keeps others from beginning.
        self._must_stop = threading.Event()
        # Held by the one who stops it.
        self._stopping = threading.Lock()
        self._waiting: list[_Job] = []
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="embedded-engine")
        self._released_shapes: list[torch.Size] = []

    async def generate(self, request: GenerateRequest) -> list[Generation]:
        """`request.n` continuations. A prompt that leaves no room for a token gets status error.

        Raises RunError for a token id outside the vocabulary.
        """
        request.check_tokens(self._model.config.get_text_config().vocab_size, self.name)
        job = _Job(self._sequences(request))
        self._waiting.append(job)
        await self._others_come()
        self._thread.submit(self._answer_waiting)
        return await asyncio.wrap_future(job.answer)

    async def _others_come(self) -> None:
        """Returns when those who start requests together with this one have done so.

        Turns of the event loop are counted, and no time, so that the same requests make the
        same batch whenever they are sent.
        """
        num_quiet = 0
        while num_quiet < _QUIET_TURNS:
            num_waiting = len(self._waiting)
            await asyncio.sleep(0)
            num_quiet = num_quiet + 1 if len(self._waiting) == num_waiting else 0

    def health(self) -> bool:
        """It lives as long as this process does."""
        return True

    def pause(self, mode: PauseMode = "retract") -> None:
        """Returns when no forward runs. Modes that keep requests are one here: a request goes on
        from its tokens after `resume`, in a batch of its own cache.
        """
        self._paused = True
        if mode == "abort":
            self.interrupt()
        else:
            with self._batch_stopped():
                pass

    def resume(self) -> None:
        self._paused = False
        self._thread.submit(self._answer_waiting)

    def interrupt(self) -> None:
        with self._batch_stopped():
            while self._waiting:
                self._waiting.pop(0).finish(aborted=True)

    def close(self) -> None:
        """Ends its requests and its thread."""
        self.pause("abort")
        self._thread.shutdown()

    def flush(self) -> None:
        """Nothing needs to be done: a cache ends with its batch."""

    def policy_version(self) -> int:
        return self._version

    def update_weights_from_disk(self, path: str, version: int, *, flush: bool = True) -> None:
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

    @contextmanager
    def _batch_stopped(self) -> Iterator[None]:
        """Inside, no batch runs; the unfinished requests of the one that ran wait again."""
        with self._stopping:
            self._must_stop.set()
            try:
                with self._alone("the running batch"):
                    self._must_stop.clear()
                    yield
            finally:
                self._must_stop.clear()

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

    def _answer_waiting(self) -> None:
        """Makes batches of the requests that wait, until none is left or the engine pauses."""
        try:
            with self._alone("a weight update"):
                while self._waiting and not (self._paused or self._must_stop.is_set()):
                    self._run_batch(list(self._waiting))
        except Exception as e:  # whoever waits has to hear of it
            while self._waiting:
                self._waiting.pop(0).fail(e)

    def _run_batch(self, jobs: Sequence[_Job]) -> None:
        """Answers these requests; those that a stop leaves unfinished stay among the waiting."""

        def is_over() -> bool:
            return self._must_stop.is_set() or all(job.answer.cancelled() for job in jobs)

        running = [sequence for job in jobs for sequence in job.sequences if not sequence.done]
        for first in range(0, len(running), _MAX_SEQUENCES):
            batch = running[first : first + _MAX_SEQUENCES]
            _sample(self._model, batch, self._experts, self._version, is_over)
        for job in jobs:
            if job.answer.cancelled() or all(sequence.done for sequence in job.sequences):
                self._waiting.remove(job)
                job.finish()

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
def _sample(
    model: PreTrainedModel,
    sequences: Sequence[_Sequence],
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


class _Float32Linear(torch.nn.Linear):
    """A linear layer whose result is of float32, whatever its weight is."""

    def forward(self, hidden: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return torch.nn.functional.linear(hidden.float(), self.weight.float(), bias)


def _compute_logits_in_float32(model: PreTrainedModel) -> None:
    """Logits of bfloat16 would have three digits; the trainer's logprobs are those of
    float32 ones.
    """
    head = model.get_output_embeddings()
    if isinstance(head, torch.nn.Linear):
        head.__class__ = _Float32Linear


def _keep_experts(sequences: Sequence[_Sequence], experts: Tensor | None) -> None:
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
    sequences: Sequence[_Sequence], chosen: Tensor, logprobs: Tensor, version: int
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
