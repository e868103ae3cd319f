"""Sampling in this process with transformers: for machines without SGLang, and the fast path of tests.

Requests that arrive together are one batch: left-padded prompts, one forward per token for all of them, with
a cache. It is no fast engine (finished rows stay in the batch until its last one ends), but an honest one.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from nanoslime.storage.safetensors_file import read_headers
from nanoslime.types import GenerateRequest, Generation, RunError, Status


class EmbeddedEngine:
    """An `Engine` in this process. Weights and forwards exclude each other by a lock, waited for with a
    deadline."""

    def __init__(
        self,
        model_path: str,
        dtype: str,
        device: str,
        seed: int,
        name: str = "embedded",
        *,
        max_batch_rows: int = 1024,
        deadline_s: float = 300.0,
    ) -> None:
        """`seed` is for requests without one of their own; `max_batch_rows` bounds the sequences of one
        forward."""
        self.name = name
        self._names = set(read_headers(Path(model_path)))
        self._model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=getattr(torch, dtype)
        )
        self._model.to(device).eval()
        self._seeds = torch.Generator().manual_seed(seed)
        self._max_batch_rows, self._deadline_s = max_batch_rows, deadline_s
        self._version = 0
        self._paused = False
        self._busy = threading.Lock()
        self._pending: list[tuple[GenerateRequest, asyncio.Future[list[Generation]]]] = []
        self._drain: asyncio.Task[None] | None = None

    async def generate(self, request: GenerateRequest) -> list[Generation]:
        """`request.n` continuations. A prompt that leaves no room for a token gives status error.

        Raises RunError for a token id outside the vocabulary.
        """
        vocab_size = self._model.config.get_text_config().vocab_size
        for position, token in enumerate(request.token_ids):
            if not 0 <= token < vocab_size:
                raise RunError(
                    f"engine {self.name}: token id {token} at position {position} of a prompt is not in the "
                    f"vocabulary of {vocab_size}; is the tokenizer the checkpoint's own?"
                )
        future = asyncio.get_running_loop().create_future()
        if self._drain is None or self._drain.done():
            self._pending = []  # what an event loop left that ended early
            self._drain = asyncio.create_task(self._drain_pending())
        self._pending.append((request, future))
        return await future

    def health(self) -> bool:
        return True

    def pause(self) -> None:
        """Returns when no forward runs; requests wait until `resume`."""
        self._paused = True
        self._acquire("the running batch to end")
        self._busy.release()

    def resume(self) -> None:
        self._paused = False

    def flush(self) -> None:
        """Nothing to do: no cache outlives its batch."""

    def policy_version(self) -> int:
        return self._version

    def update_weights_from_disk(self, path: str, version: int) -> None:
        """Load a directory's safetensors. Raises RunError, weights unchanged, when it lacks a tensor or has
        others."""
        files = sorted({info.file for info in read_headers(Path(path)).values()})
        self.load_weights((pair for file in files for pair in load_file(file).items()), version)

    def load_weights(self, named: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy tensors, under the names of the checkpoint, into the model. Raises RunError, weights
        unchanged, for unknown, repeated and missing names and other shapes."""
        tensors: dict[str, Tensor] = {}
        for name, tensor in named:
            if name not in self._names or name in tensors:
                problem = "came twice" if name in tensors else "is not in the engine's checkpoint"
                raise RunError(f"engine {self.name} refused version {version}: tensor {name!r} {problem}")
            tensors[name] = tensor
        if missing := sorted(self._names - set(tensors)):
            raise RunError(
                f"engine {self.name} refused version {version}: {len(missing)} of {len(self._names)} tensors "
                f"missing: {', '.join(missing[:5])}"
            )
        self._acquire("the running batch to end")
        try:
            self._copy(tensors, version)
        finally:
            self._busy.release()
        self._version = version

    def close(self) -> None:
        """Nothing to end."""

    def _acquire(self, what: str) -> None:
        if not self._busy.acquire(timeout=self._deadline_s):
            raise RunError(f"engine {self.name}: waited {self._deadline_s:g} s for {what}")

    def _copy(self, tensors: dict[str, Tensor], version: int) -> None:
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        if not tensors.keys() <= parameters.keys():
            # transformers 5 holds the experts of a layer fused, under other names
            fresh = type(self._model).from_pretrained(
                None, config=self._model.config, state_dict=tensors, dtype=self._model.dtype
            )
            tensors, parameters = dict(fresh.named_parameters()), dict(self._model.named_parameters())
        for name, tensor in tensors.items():
            if tensor.shape != parameters[name].shape:
                raise RunError(
                    f"engine {self.name} refused version {version}: tensor {name!r} has shape "
                    f"{list(tensor.shape)}, the model {list(parameters[name].shape)}"
                )
        with torch.no_grad():
            for name, tensor in tensors.items():
                parameters[name].copy_(tensor)

    async def _drain_pending(self) -> None:
        await asyncio.sleep(0)  # whoever was started together with the first request joins its batch
        while self._pending:
            while self._paused:
                await asyncio.sleep(0.01)
            batch = self._take_batch()
            requests = [request for request, _ in batch]
            try:
                answers = self._generate(requests)
            except Exception as e:
                for _, future in batch:
                    future.set_exception(e)
                continue
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.cancelled():
                    future.set_result(answer)

    def _take_batch(self) -> list[tuple[GenerateRequest, asyncio.Future[list[Generation]]]]:
        rows, count = 0, 0
        for request, _ in self._pending:
            rows += request.n
            if count and rows > self._max_batch_rows:
                break
            count += 1
        batch, self._pending = self._pending[:count], self._pending[count:]
        return batch

    def _generate(self, requests: Sequence[GenerateRequest]) -> list[list[Generation]]:
        rows = [row for request in requests for row in self._rows(request)]
        self._acquire("a weight update to end")
        try:
            _sample(self._model, [row for row in rows if row.limit > 0])
        finally:
            self._busy.release()
        answers = iter(row.generation(self._version) for row in rows)
        return [[next(answers) for _ in range(request.n)] for request in requests]

    def _rows(self, request: GenerateRequest) -> Iterator[_Row]:
        seed = request.seed
        if seed is None:
            seed = int(torch.randint(2**62, (), generator=self._seeds))
        context = self._model.config.get_text_config().max_position_embeddings
        limit = max(0, min(request.max_new_tokens, context - len(request.token_ids)))
        randoms = torch.rand(
            request.n, limit, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        eos = self._model.generation_config.eos_token_id if self._model.generation_config else None
        eos_ids = [] if eos is None else [eos] if isinstance(eos, int) else eos
        for i in range(request.n):
            yield _Row(request, limit, frozenset([*request.stop_token_ids, *eos_ids]), randoms[i])


@dataclass(slots=True)
class _Row:
    """One sequence being sampled."""

    request: GenerateRequest
    limit: int  # tokens it may get: max_new_tokens, or less where the context ends
    stop_ids: frozenset[int]
    randoms: (
        Tensor  # float64 [limit] in [0, 1): its own, so that a batch's other rows do not change its samples
    )
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False

    @property
    def done(self) -> bool:
        return self.stopped or len(self.token_ids) == self.limit

    def add(self, token: int, logprob: float) -> None:
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        self.stopped = token in self.stop_ids

    def generation(self, version: int) -> Generation:
        if self.limit == 0:
            error = f"a prompt of {len(self.request.token_ids)} tokens fills the model's context"
            return Generation([], [], Status.ERROR, [], error=error)
        status = Status.COMPLETED if self.stopped else Status.TRUNCATED
        return Generation(self.token_ids, self.logprobs, status, [(0, version)])


@torch.inference_mode()
def _sample(model: PreTrainedModel, rows: Sequence[_Row]) -> None:
    """Fill in the rows' tokens and logprobs, one token of each per forward."""
    if not rows:
        return
    longest = max(len(row.request.token_ids) for row in rows)
    padding = torch.tensor([longest - len(row.request.token_ids) for row in rows])
    tokens = torch.tensor(
        [[0] * (longest - len(r.request.token_ids)) + list(r.request.token_ids) for r in rows]
    )
    mask = torch.arange(longest) >= padding[:, None]  # [B, P], left padding
    positions = (torch.arange(longest) - padding[:, None]).clamp(min=0)
    temperatures = torch.tensor([row.request.temperature for row in rows], device=model.device)
    steps = max(row.limit for row in rows)
    randoms = torch.zeros(len(rows), steps, dtype=torch.float64)
    for i, row in enumerate(rows):
        randoms[i, : row.limit] = row.randoms
    cache = None
    for step in range(steps):
        output = model(
            input_ids=tokens.to(model.device),
            attention_mask=mask.to(model.device),
            position_ids=positions.to(model.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        logprobs = torch.log_softmax(output.logits[:, -1].float() / temperatures[:, None], -1)  # [B, V]
        chosen = pick(_filtered(logprobs, rows), randoms[:, step].to(model.device))  # [B]
        picked = logprobs.gather(1, chosen[:, None])[:, 0]
        for row, token, logprob in zip(rows, chosen.tolist(), picked.tolist(), strict=True):
            if not row.done:
                row.add(token, logprob)
        if all(row.done for row in rows):
            return
        tokens, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=torch.bool)], 1)


def pick(probs: Tensor, randoms: Tensor) -> Tensor:
    """Sample one token per row by inverting the cumulative distribution: probs [B, V], randoms [B] in [0, 1)
    -> [B]."""
    cumulative = probs.double().cumsum(-1)
    chosen = torch.searchsorted(cumulative, randoms[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return chosen.clamp(max=probs.shape[-1] - 1)


def _filtered(logprobs: Tensor, rows: Sequence[_Row]) -> Tensor:
    """Probabilities [B, V] with all but the top k and the top p of each row's mass set to zero; not
    normalised."""
    probs = logprobs.exp()
    if all(row.request.top_p == 1.0 and row.request.top_k <= 0 for row in rows):
        return probs
    vocab_size = probs.shape[-1]
    top_p = torch.tensor([row.request.top_p for row in rows], device=probs.device)
    top_k = torch.tensor(
        [k if 0 < (k := row.request.top_k) else vocab_size for row in rows], device=probs.device
    )
    ordered, order = probs.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered  # mass of the tokens ahead of each
    rank = torch.arange(vocab_size, device=probs.device)
    dropped = (rank >= top_k[:, None]) | (before >= top_p[:, None]) & (top_p < 1.0)[:, None]
    return probs.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), 0.0)
