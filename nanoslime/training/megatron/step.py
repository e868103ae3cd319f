"""Logprobs and gradients of packed micro-batches by Megatron's pipeline schedules.

TrainBatch -> MicroBatch [T] -> GPTModel (thd) -> hidden [T, H] -> logprobs [T] -> loss
/ denominator

Under context parallelism a rank has a part of each sequence, from the tokens to their
logprobs. The logprobs come together before the loss, which is the same on all ranks of
the group.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel as DDP
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from nanoslime.algorithms.policy_gradient import PolicyGradient
from nanoslime.batch import MicroBatch, TrainBatch, on_device
from nanoslime.models.rules import padded_vocab_size
from nanoslime.models.shape import ModelShape
from nanoslime.training.logprobs import linear_logprobs
from nanoslime.training.megatron.context_parallel import ContextParallelShard
from nanoslime.training.megatron.model import unwrap, uses_local_spec
from nanoslime.training.megatron.packed_sequences import packed_inputs
from nanoslime.training.megatron.parallel import Ranks
from nanoslime.training.megatron.routing_replay import replayed, routers, training_step
from nanoslime.training.metrics import MetricSums, ReducedMetrics


@dataclass(frozen=True, slots=True)
class Pack:
    """A micro-batch, and the tokens of it that this context-parallel rank has."""

    indices: list[int]  # of its sequences in the TrainBatch
    batch: MicroBatch
    cp_shard: ContextParallelShard


class Pipeline:
    """This rank's model chunks, driven over the micro-batches of a TrainBatch."""

    def __init__(
        self, model_chunks: list[DDP], shape: ModelShape, ranks: Ranks, device: torch.device
    ) -> None:
        self._model_chunks = model_chunks
        self._shape = shape
        self._ranks = ranks
        self._device = device
        self._sequence_parallel = model_chunks[0].config.sequence_parallel
        self._length_multiple = 1
        if self._sequence_parallel:
            self._length_multiple *= ranks.tp_size
        if ranks.cp_size > 1:
            self._length_multiple *= 2 * ranks.cp_size

    def logprobs(self, shard: TrainBatch) -> list[Tensor]:
        """[T] on the CPU per micro-batch of `shard`; nothing before the last stage.

        If `shard` has routed experts, the unknown ones (-1) are set to what this rank's
        routers choose.
        """

        def logprobs_of(pack: Pack, hidden: Tensor, non_loss_data: bool) -> Tensor:
            logprobs, _ = self._token_logprobs(pack, hidden)
            return logprobs.cpu()

        return self._run(shard, logprobs_of, forward_only=True, collect_non_loss_data=True)

    def gradients(self, shard: TrainBatch, algorithm: PolicyGradient) -> ReducedMetrics | None:
        """Fills the gradient buffers, summed over ranks; metrics on the last stage."""
        sums = MetricSums()

        def loss_of(pack: Pack, hidden: Tensor) -> tuple[Tensor, Tensor, None]:
            logprobs, entropy = self._token_logprobs(pack, hidden, with_entropy=True)
            assert entropy is not None
            loss, metrics = algorithm.loss(logprobs, entropy, pack.batch)
            sums.add(loss, metrics, logprobs, pack.batch)
            num_tokens = torch.zeros([], dtype=torch.int, device=hidden.device)
            return loss / pack.batch.denominator, num_tokens, None

        for chunk in self._model_chunks:
            chunk.zero_grad_buffer()
        routing_metrics: dict[str, float] = {}
        routing: AbstractContextManager[None] = nullcontext()
        if shard.routed_experts:
            all_routers = []
            for chunk in self._model_chunks:
                all_routers += routers(unwrap(chunk))
            routing = training_step(all_routers, routing_metrics)
        with routing:
            self._run(shard, loss_of, forward_only=False)
        if not self._ranks.is_last_stage:
            return None
        reduced = sums.reduce(self._ranks.dp_group)
        reduced.means.update(routing_metrics)
        return reduced

    def _run(self, shard: TrainBatch, loss_func: Callable[..., Any], **options: Any) -> list[Any]:
        """Runs all micro-batches; what loss_func(pack, hidden) gave, on the last stage."""

        def forward_step(packs: Iterator[Pack], model: DDP) -> tuple[Tensor, Callable[..., Any]]:
            pack = next(packs)
            gpt = unwrap(model)
            inputs = packed_inputs(
                pack.cp_shard.local(pack.batch.token_ids),
                pack.cp_shard,
                local_spec=uses_local_spec(gpt.config),
            )
            with _without_output_layer(gpt), self._routed(gpt, pack):
                hidden = model(**inputs)
            if not torch.is_grad_enabled():
                _record_experts(shard, pack)
            return hidden, partial(loss_func, pack)

        iterators = [self._packs(shard) for _ in self._model_chunks]
        interleaved = len(self._model_chunks) > 1
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if interleaved else iterators[0],
            model=self._model_chunks if interleaved else self._model_chunks[0],
            num_microbatches=len(shard.microbatches),
            seq_length=1,  # the stages tell one another the shapes (variable_seq_lengths)
            micro_batch_size=1,
            **options,
        )

    def _packs(self, shard: TrainBatch) -> Iterator[Pack]:
        for indices in shard.microbatches:
            batch = shard.microbatch(indices).to(self._device)
            cp_shard = ContextParallelShard(
                batch.lengths, self._ranks.cp_group, self._length_multiple, self._device
            )
            yield Pack(indices, batch, cp_shard)

    @contextmanager
    def _routed(self, gpt: GPTModel, pack: Pack) -> Iterator[None]:
        """Inside, a forward takes the experts of the pack.

        Afterwards the unknown ones (-1) among them are what the routers of this rank
        chose.
        """
        experts = pack.batch.routed_experts
        if experts is None:
            yield
            return
        local_tokens = pack.cp_shard.tokens
        if self._sequence_parallel:
            local_tokens = local_tokens.chunk(self._ranks.tp_size)[self._ranks.place.tp_rank]
        places = (local_tokens >= 0).nonzero()[:, 0]
        tokens = on_device(local_tokens[places], experts.device)
        places = on_device(places, experts.device)
        local_experts = experts.new_full((len(local_tokens), *experts.shape[1:]), -1)
        local_experts[places] = experts[tokens]
        with replayed(routers(gpt), local_experts):
            yield
        experts[tokens] = local_experts[places]

    def _token_logprobs(
        self, pack: Pack, hidden: Tensor, *, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Logprobs and entropies [T] as logprobs.token_logprobs defines them.

        hidden is [P / cp_size, 1, H], or [P / cp_size / tp_size, 1, H] with sequence
        parallelism.
        """
        gpt = unwrap(self._model_chunks[-1])
        if self._sequence_parallel:
            # Each rank gets the whole gradient, and takes its own part of it.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        if gpt.share_embeddings_and_output_weights:
            weight = gpt.shared_embedding_or_output_weight()
        else:
            weight = gpt.output_layer.weight
        padded_size = padded_vocab_size(self._shape, self._ranks.tp_size)
        vocab_per_rank = padded_size // self._ranks.tp_size
        # Row t of hidden predicts token t + 1.
        next_tokens = pack.batch.token_ids.roll(-1)
        local_logprobs, local_entropy = linear_logprobs(
            hidden[:, 0].to(weight.dtype),  # Float16Module returns float32
            weight,
            pack.cp_shard.local(next_tokens),
            temperature=pack.batch.temperature,
            vocab_size=self._shape.vocab_size,
            vocab_start=self._ranks.place.tp_rank * vocab_per_rank,
            tp_group=self._ranks.tp_group if self._ranks.tp_size > 1 else None,
            with_entropy=with_entropy,
        )
        logprobs = _of_tokens(local_logprobs, pack)
        if local_entropy is None:
            return logprobs, None
        return logprobs, _of_tokens(local_entropy, pack)


def _of_tokens(local_predictions: Tensor, pack: Pack) -> Tensor:
    """[T]: moves each value from the row that predicts a token to the token.

    The first token of a sequence gets 0. local_predictions is [P / cp_size].
    """
    predictions = pack.cp_shard.gather(local_predictions)
    return predictions.roll(1).masked_fill(pack.batch.positions == 0, 0.0)


def _record_experts(shard: TrainBatch, pack: Pack) -> None:
    """Puts the experts that a forward used into `shard`, where it has room for them."""
    if not shard.routed_experts or pack.batch.routed_experts is None:
        return
    lengths = [len(shard.token_ids[index]) for index in pack.indices]
    by_sequence = pack.batch.routed_experts.cpu().split(lengths)
    for index, experts in zip(pack.indices, by_sequence, strict=True):
        shard.routed_experts[index] = torch.maximum(shard.routed_experts[index], experts)


@contextmanager
def _without_output_layer(gpt: GPTModel) -> Iterator[None]:
    """Inside, forward returns hidden states [T, 1, H] on every stage.

    On the last stage they come after the final norm.
    """
    post_process = gpt.post_process
    # The decoder has a flag of its own, which adds the final norm.
    gpt.post_process = False
    try:
        yield
    finally:
        gpt.post_process = post_process
