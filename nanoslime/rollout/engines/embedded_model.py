"""Sampling in this process with transformers, without a server.

Requests that arrive together are one batch: left-padded prompts, one forward per token
for all of them, with a KV cache, in a thread of the engine's own. The engine is not fast
(a finished sequence stays in the batch until the last one ends), but its logprobs are
exact. A batch can be stopped between two tokens; what it has sampled stays.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from nanoslime.engine_kind import EngineStart
from nanoslime.models.shape import ModelShape
from nanoslime.rollout.engines.embedded_sampling import (
    ExpertRecorder,
    Sampled,
    StopTexts,
    sample_batch,
)
from nanoslime.rollout.weight_check import ExpectedTensors, changed, fingerprints
from nanoslime.storage.safetensors_file import read_headers
from nanoslime.types import GenerateRequest, Generation, MemoryPart, PauseMode, RunError, TensorKind

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

    sequences: list[Sampled]
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
            for job in self._remove(list(self._waiting)):
                job.finish(aborted=True)

    def close(self) -> None:
        """Ends its requests and its thread."""
        self.pause("abort")
        self._thread.shutdown()

    def score(self, token_ids: Sequence[int]) -> tuple[list[float], int]:
        """A batch that runs goes on after it, from the tokens that it has."""
        ids = torch.tensor(list(token_ids), device=self._model.device)
        with self._batch_stopped(), torch.no_grad():
            logits = self._model(ids[None]).logits[0, :-1].float()
            version = self._version
        self._thread.submit(self._answer_waiting)
        logprobs = logits.log_softmax(-1).gather(1, ids[1:, None])
        return logprobs[:, 0].tolist(), version

    def agree(self, tensors: Sequence[TensorKind]) -> None:
        problem = self._expected.disagreement(tensors, self._model)
        if problem:
            raise RunError(f"engine {self.name} cannot take the trainer's weights: {problem}")

    def flush(self) -> None:
        """Nothing needs to be done: a cache ends with its batch."""

    def policy_version(self) -> int:
        return self._version

    def update_weights_from_disk(
        self, path: str, version: int, *, flush: bool = True, compares: bool = False
    ) -> None:
        """`load_weights` from the safetensors of a directory."""
        files = {info.file for info in read_headers(Path(path)).values()}
        before = fingerprints(self._model) if compares else {}
        self.load_weights(_tensors_of(sorted(files)), version)
        problem = changed(self._model, before) if compares else None
        if problem:
            raise RunError(f"engine {self.name} refused version {version}: {problem}")

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
                # One element stands for all of them: it keeps its shape.
                parameter.data = parameter.data.new_empty(1).expand(parameter.shape)

    def resume_memory(self, part: MemoryPart) -> None:
        if part == "cache":
            return  # the next batch makes its own
        for parameter in self._model.parameters():
            parameter.data = parameter.data.new_empty(parameter.shape)

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
        jobs = list(self._waiting)
        try:
            with self._alone("a weight update"):
                while self._waiting and not (self._paused or self._must_stop.is_set()):
                    jobs = list(self._waiting)
                    self._run_batch(jobs)
        except Exception as e:  # whoever waits has to hear of it
            for job in self._remove(jobs):
                job.fail(e)

    def _remove(self, jobs: Sequence[_Job]) -> list[_Job]:
        """Takes those of `jobs` that wait from the waiting, before any is told: who hears of it
        may ask again at once.
        """
        removed = [job for job in jobs if job in self._waiting]
        for job in removed:
            self._waiting.remove(job)
        return removed

    def _run_batch(self, jobs: Sequence[_Job]) -> None:
        """Answers these requests; those that a stop leaves unfinished stay among the waiting."""

        def is_over() -> bool:
            return self._must_stop.is_set() or all(job.answer.cancelled() for job in jobs)

        running = [sequence for job in jobs for sequence in job.sequences if not sequence.done]
        for first in range(0, len(running), _MAX_SEQUENCES):
            batch = running[first : first + _MAX_SEQUENCES]
            sample_batch(self._model, batch, self._experts, self._version, is_over)
        for job in jobs:
            if job.answer.cancelled() or all(sequence.done for sequence in job.sequences):
                self._waiting.remove(job)
                job.finish()

    def _sequences(self, request: GenerateRequest) -> list[Sampled]:
        """The `request.n` sequences of a request, before their first token."""
        seed = request.seed
        if seed is None:
            seed = int(torch.randint(2**62, (), generator=self._seeds))
        room = self._context_length - len(request.token_ids)
        max_tokens = max(0, min(request.max_new_tokens, room))
        generator = torch.Generator().manual_seed(seed)
        randoms = torch.rand(request.n, max_tokens, dtype=torch.float64, generator=generator)
        stop_ids = frozenset(request.stop_token_ids) | self._eos_ids()
        texts = StopTexts(request.stop, self._tokenizer) if request.stop else None
        return [Sampled(request, max_tokens, stop_ids, texts, row) for row in randoms]

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


def _tensors_of(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        yield from load_file(file).items()
