"""Sampling in this process with transformers: for machines without SGLang, and the fast path of tests.

Requests that arrive together are one batch: left-padded prompts, one forward per token for all of them, with
a cache. It is no fast engine (finished rows stay in the batch until its last one ends), but an honest one.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedModel

from nanoslime.models.shape import ModelShape
from nanoslime.rollout.weight_check import checkpoint_shapes, first_problem, missing
from nanoslime.storage.safetensors_file import read_headers
from nanoslime.types import GenerateRequest, Generation, MemoryPart, RunError, Status

_MAX_ROWS = 1024  # sequences of one forward
_DEADLINE_S = 300.0  # for a batch or a weight update to end


@dataclass(eq=False, slots=True)
class _Job:
    request: GenerateRequest
    answer: list[Generation] | None = None


class EmbeddedEngine:
    """An `Engine` in this process. Weights and forwards exclude each other by a lock with a deadline."""

    name = "embedded"

    def __init__(self, model_path: str, dtype: str, device: str, seed: int) -> None:
        """`seed` is for requests without one of their own."""
        self._expected = checkpoint_shapes(model_path)
        self._model = AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, dtype))
        self._model.to(device).eval()
        self._routed: list[
            Tensor
        ] = []  # experts [tokens, topk] of each layer that has some, in one forward
        if moe := (shape := ModelShape.read(model_path)).moe:
            number = torch.uint8 if moe.num_experts <= 256 else torch.int16
            for layer in shape.moe_layers:
                experts = self._model.get_submodule(f"model.layers.{layer}.mlp.experts")
                experts.register_forward_pre_hook(
                    lambda _, args: self._routed.append(args[1].to(number))
                )
        self._seeds = torch.Generator().manual_seed(seed)
        self._version, self._paused = 0, False
        self._busy = threading.Lock()
        self._waiting: list[_Job] = []
        self._released: list[torch.Size] = []

    async def generate(self, request: GenerateRequest) -> list[Generation]:
        """`request.n` continuations. A prompt that leaves no room for a token gives status error.

        Raises RunError for a token id outside the vocabulary.
        """
        request.check_tokens(self._model.config.get_text_config().vocab_size, self.name)
        job = _Job(request)
        self._waiting.append(job)
        try:
            await asyncio.sleep(0)  # whoever was started together with this request joins its batch
            while self._paused:
                await asyncio.sleep(0.01)
            if job.answer is None:  # the first to wake up answers for all
                self._answer([job for job in self._waiting if job.answer is None])
        finally:
            self._waiting.remove(job)
        assert job.answer is not None
        return job.answer

    def pause(self) -> None:
        """Returns when no forward runs; requests wait until `resume`."""
        self._paused = True
        with self._alone("the running batch"):
            pass

    def resume(self) -> None:
        self._paused = False

    def flush(self) -> None:
        """Nothing to do: no cache outlives its batch."""

    def policy_version(self) -> int:
        return self._version

    def update_weights_from_disk(self, path: str, version: int) -> None:
        """`load_weights` from a directory's safetensors."""
        files = sorted({info.file for info in read_headers(Path(path)).values()})
        self.load_weights((pair for file in files for pair in load_file(file).items()), version)

    def load_weights(self, named: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy tensors, under the names of the checkpoint, into the model. Raises RunError, weights
        unchanged, for unknown, repeated and missing names and other shapes."""
        pairs = list(named)
        shapes, tensors = [(name, tuple(tensor.shape)) for name, tensor in pairs], dict(pairs)
        if problem := first_problem(shapes, self._expected) or missing(self._expected, tensors):
            raise RunError(f"engine {self.name} refused version {version}: {problem}")
        with self._alone("the running batch"):
            self._copy(tensors)
            self._version = version

    def release_memory(self) -> None:
        with self._alone("the running batch"):
            for parameter in self._model.parameters():
                self._released.append(parameter.shape)
                parameter.data = parameter.data.new_empty(0)

    def resume_memory(self, part: MemoryPart) -> None:
        if part == "weights":  # a cache lives only as long as its batch
            for parameter, shape in zip(self._model.parameters(), self._released, strict=True):
                parameter.data = parameter.data.new_empty(shape)
            self._released.clear()

    @contextmanager
    def _alone(self, other: str) -> Iterator[None]:
        if not self._busy.acquire(timeout=_DEADLINE_S):
            raise RunError(f"engine {self.name}: waited {_DEADLINE_S:g} s for {other} to end")
        try:
            yield
        finally:
            self._busy.release()

    def _copy(self, tensors: dict[str, Tensor]) -> None:
        parameters = dict((model := self._model).named_parameters(remove_duplicate=False))
        if not tensors.keys() <= parameters.keys():
            # transformers 5 holds the experts of a layer fused, under other names
            like = {"config": model.config, "dtype": model.dtype}
            fresh = type(model).from_pretrained(None, state_dict=tensors, **like)
            tensors, parameters = dict(fresh.named_parameters()), dict(model.named_parameters())
        with torch.no_grad():
            for name, tensor in tensors.items():
                parameters[name].copy_(tensor)

    def _answer(self, jobs: Sequence[_Job]) -> None:
        rows_of = {job: self._rows(job.request) for job in jobs}
        rows = [row for rows in rows_of.values() for row in rows if row.limit > 0]
        with self._alone("a weight update"):
            for first in range(0, len(rows), _MAX_ROWS):
                _sample(self._model, rows[first : first + _MAX_ROWS], self._routed)
            for job, own in rows_of.items():
                job.answer = [row.generation(self._version) for row in own]

    def _rows(self, request: GenerateRequest) -> list[_Row]:
        seed = (
            int(torch.randint(2**62, (), generator=self._seeds))
            if request.seed is None
            else request.seed
        )
        context = self._model.config.get_text_config().max_position_embeddings
        limit = max(0, min(request.max_new_tokens, context - len(request.token_ids)))
        generator = torch.Generator().manual_seed(seed)
        randoms = torch.rand(request.n, limit, dtype=torch.float64, generator=generator)
        eos = self._model.generation_config.eos_token_id if self._model.generation_config else None
        eos_ids = [] if eos is None else [eos] if isinstance(eos, int) else eos
        stop_ids = frozenset([*request.stop_token_ids, *eos_ids])
        return [_Row(request, limit, stop_ids, own) for own in randoms]


@dataclass(slots=True)
class _Row:
    """One sequence being sampled."""

    request: GenerateRequest
    limit: int  # tokens it may get: max_new_tokens, or less where the context ends
    stop_ids: frozenset[int]
    randoms: (
        Tensor  # float64 [limit] in [0, 1): its own, so that other rows do not change its samples
    )
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    experts: list[Tensor] = field(
        default_factory=list
    )  # [tokens, num_moe_layers, topk] of each forward

    @property
    def stopped(self) -> bool:
        return bool(self.token_ids) and self.token_ids[-1] in self.stop_ids

    @property
    def done(self) -> bool:
        return self.stopped or len(self.token_ids) == self.limit

    def generation(self, version: int) -> Generation:
        if self.limit == 0:
            error = f"a prompt of {len(self.request.token_ids)} tokens fills the model's context"
            return Generation([], [], Status.ERROR, [], error=error)
        status = Status.COMPLETED if self.stopped else Status.TRUNCATED
        experts = torch.cat(self.experts).numpy() if self.experts else None
        return Generation(
            self.token_ids, self.logprobs, status, [(0, version)], routed_experts=experts
        )


@torch.inference_mode()
def _sample(model: PreTrainedModel, rows: Sequence[_Row], routed: list[Tensor]) -> None:
    """Fill in the rows' tokens, logprobs and experts, one token of each per forward, which fills `routed`."""
    device = model.device
    prompts = [torch.tensor(row.request.token_ids) for row in rows]
    tokens = pad_sequence(prompts, batch_first=True, padding_side="left").to(device)  # [B, P]
    attended = [torch.ones_like(prompt) for prompt in prompts]
    mask = pad_sequence(attended, batch_first=True, padding_side="left").to(device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    temperatures = torch.tensor([row.request.temperature for row in rows], device=device)
    randoms = pad_sequence([row.randoms for row in rows], batch_first=True).to(
        device
    )  # [B, longest limit]
    cache = None
    for step in range(randoms.shape[1]):
        inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        routed.clear()
        output = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        if routed:
            experts = (
                torch.stack(routed, 1).unflatten(0, (len(rows), -1)).cpu()
            )  # [B, P or 1, layers, topk]
            for row, own in zip(rows, experts, strict=True):
                row.experts += [] if row.done else [own[-len(row.request.token_ids) :]]
        logprobs = torch.log_softmax(
            output.logits[:, -1].float() / temperatures[:, None], -1
        )  # [B, V]
        chosen = pick(_filtered(logprobs, rows), randoms[:, step])[:, None]  # [B, 1]
        picked = logprobs.gather(1, chosen)
        for row, [token], [logprob] in zip(rows, chosen.tolist(), picked.tolist(), strict=True):
            if not row.done:
                row.token_ids.append(token)
                row.logprobs.append(logprob)
        if all(row.done for row in rows):
            return
        tokens, positions = chosen, positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(chosen)], 1)


def pick(probs: Tensor, randoms: Tensor) -> Tensor:
    """One token per row, by inverting its distribution: probs [B, V], randoms [B] in [0, 1) -> [B]."""
    cumulative = probs.double().cumsum(-1)
    chosen = torch.searchsorted(cumulative, randoms[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return chosen.clamp(max=probs.shape[-1] - 1)


def _filtered(logprobs: Tensor, rows: Sequence[_Row]) -> Tensor:
    """Probabilities [B, V], zero but for the top k and the top p of each row's mass; not normalised."""
    probs = logprobs.exp()
    if all(row.request.top_p == 1.0 and row.request.top_k <= 0 for row in rows):
        return probs
    rank = torch.arange(probs.shape[-1], device=probs.device)
    top_p = torch.tensor([[row.request.top_p] for row in rows], device=probs.device)
    top_k = torch.tensor([[k if (k := row.request.top_k) > 0 else len(rank)] for row in rows]).to(
        rank
    )
    ordered, order = probs.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered  # mass of the tokens ahead of each
    dropped = (rank >= top_k) | (before >= top_p) & (top_p < 1.0)
    return probs.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), 0.0)
