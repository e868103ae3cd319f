"""Packed micro-batches through Megatron's pipeline schedules: logprobs, and the gradient of a loss.

TrainBatch -> MicroBatch [T] -> GPTModel (thd) -> hidden [T, H] -> logprobs [T] -> loss / denominator

Under context parallelism a rank has a part of each sequence, from its tokens to their logprobs; these come
together before the loss, which is the same on all ranks of the group.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel as DDP
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from nanoslime.batch import MicroBatch, TrainBatch
from nanoslime.models.rules import padded_vocab_size
from nanoslime.models.shape import ModelShape
from nanoslime.training.backend import Algorithm
from nanoslime.training.logprobs import linear_logprobs
from nanoslime.training.megatron.context_parallel import Spread
from nanoslime.training.megatron.model import unwrap
from nanoslime.training.megatron.parallel import Ranks
from nanoslime.training.megatron.routing_replay import replayed, routers, training_step
from nanoslime.training.metrics import MetricSums, ReducedMetrics


class Pipeline:
    """This rank's pieces of the model, driven over the micro-batches of a TrainBatch."""

    def __init__(
        self, pieces: list[DDP], shape: ModelShape, ranks: Ranks, device: torch.device
    ) -> None:
        self._pieces, self._shape, self._ranks, self._device = pieces, shape, ranks, device
        self._multiple = (
            ranks.tp_size if pieces[0].config.sequence_parallel else 1
        )  # of tokens on a rank
        if ranks.cp_size > 1:
            self._multiple *= 2 * ranks.cp_size

    def logprobs(self, shard: TrainBatch) -> list[Tensor]:
        """[T] per micro-batch of `shard` on the last stage, on the CPU; empty elsewhere."""

        def finish(
            batch: MicroBatch, spread: Spread, hidden: Tensor, non_loss_data: bool
        ) -> Tensor:
            return self._token_logprobs(batch, spread, hidden)[0].cpu()

        return self._run(shard, finish, forward_only=True, collect_non_loss_data=True)

    def gradients(self, shard: TrainBatch, algorithm: Algorithm) -> ReducedMetrics | None:
        """Fills the gradient buffers, summed over ranks; metrics on the last stage."""
        sums = MetricSums()

        def finish(
            batch: MicroBatch, spread: Spread, hidden: Tensor
        ) -> tuple[Tensor, Tensor, None]:
            with_entropy = algorithm.needs_entropy
            logprobs, entropy = self._token_logprobs(
                batch, spread, hidden, with_entropy=with_entropy
            )
            loss, metrics = algorithm.loss(logprobs, entropy, batch)
            sums.add(loss, metrics, logprobs, batch)
            num_tokens = torch.zeros([], dtype=torch.int, device=hidden.device)
            return loss / batch.denominator, num_tokens, None

        for piece in self._pieces:
            piece.zero_grad_buffer()
        routing, all_routers = (
            dict[str, float](),
            [r for p in self._pieces for r in routers(unwrap(p))],
        )
        with training_step(all_routers, routing) if shard.routed_experts else nullcontext():
            self._run(shard, finish, forward_only=False)
        if not self._ranks.is_last_stage:
            return None
        reduced = sums.reduce(self._ranks.dp_group)
        reduced.means.update(routing)
        return reduced

    def _run(self, shard: TrainBatch, finish: Callable[..., Any], **options: Any) -> list[Any]:
        """What `finish(microbatch, its spread, hidden)` returned for each of them, on the last stage."""

        def forward(batches: Iterator[Any], model: DDP) -> tuple[Tensor, Callable[..., Any]]:
            indices, batch = next(batches)
            spread = Spread(batch.cu_seqlens, batch.positions, self._ranks.cp_group, self._multiple)
            tokens, positions = spread.here(batch.token_ids), spread.here(batch.positions)
            with _without_output_layer(gpt := unwrap(model)), self._routed(gpt, batch, spread):
                hidden = model(**packed_inputs(tokens, positions, spread.bounds))
            if (
                shard.routed_experts
                and batch.routed_experts is not None
                and not torch.is_grad_enabled()
            ):
                lengths = [len(shard.token_ids[i]) for i in indices]
                for i, part in zip(indices, batch.routed_experts.cpu().split(lengths), strict=True):
                    shard.routed_experts[i] = torch.maximum(shard.routed_experts[i], part)
            return hidden, partial(finish, batch, spread)

        interleaved = len(self._pieces) > 1
        data = [
            ((i, shard.microbatch(i).to(self._device)) for i in shard.microbatches)
            for _ in self._pieces
        ]
        return get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=data if interleaved else data[0],
            model=self._pieces if interleaved else self._pieces[0],
            num_microbatches=len(shard.microbatches),
            seq_length=1,  # the stages tell one another the shapes (variable_seq_lengths)
            micro_batch_size=1,
            **options,
        )

    @contextmanager
    def _routed(self, piece: GPTModel, batch: MicroBatch, spread: Spread) -> Iterator[None]:
        """The forward inside takes the experts of the batch, and adds what this rank's routers choose."""
        if (experts := batch.routed_experts) is None:
            yield
            return
        rows = spread.here(torch.arange(1, len(experts) + 1, device=experts.device)) - 1
        if unwrap(self._pieces[0]).config.sequence_parallel:
            rows = rows.chunk(self._ranks.tp_size)[self._ranks.tp_rank]
        here = experts[rows]
        here[rows < 0] = -1  # padding
        with replayed(routers(piece), here):
            yield
        experts[rows[rows >= 0]] = here[rows >= 0]

    def _token_logprobs(
        self, batch: MicroBatch, spread: Spread, hidden: Tensor, *, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """[T] each, as logprobs.token_logprobs, from hidden states [P / cp or P / cp / tp, 1, H]."""
        gpt = unwrap(self._pieces[-1])
        if (
            gpt.config.sequence_parallel
        ):  # the gradient is whole on each rank, which takes its part of it
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        tied = gpt.share_embeddings_and_output_weights
        weight = gpt.shared_embedding_or_output_weight() if tied else gpt.output_layer.weight
        columns = padded_vocab_size(self._shape, self._ranks.tp_size) // self._ranks.tp_size
        found = linear_logprobs(
            hidden[:, 0].to(weight.dtype),  # Float16Module returns float32
            weight,
            spread.here(batch.token_ids.roll(-1)),  # row t speaks of token t + 1
            temperature=batch.temperature,
            vocab_size=self._shape.vocab_size,
            vocab_start=self._ranks.tp_rank * columns,
            tp_group=self._ranks.tp_group if self._ranks.tp_size > 1 else None,
            with_entropy=with_entropy,
        )
        first = batch.positions == 0
        logprobs, *entropy = (
            spread.whole(x).roll(1).masked_fill(first, 0.0) for x in found if x is not None
        )
        return logprobs, entropy[0] if entropy else None


@contextmanager
def _without_output_layer(gpt: GPTModel) -> Iterator[None]:
    """Inside, forward returns hidden states on every stage, after the final norm on the last: [T, 1, H]."""
    last, gpt.post_process = gpt.post_process, False  # the decoder has its own word for its norm
    try:
        yield
    finally:
        gpt.post_process = last


def packed_inputs(tokens: Tensor, positions: Tensor, bounds: Tensor) -> dict[str, Any]:
    """GPTModel's arguments for sequences one after the other: [T], [T], and [N + 1], where each begins."""
    longest = int(bounds.diff().max())
    ends = dict(
        cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    packed = PackedSeqParams(qkv_format="thd", **ends)
    inputs = {"input_ids": tokens[None], "position_ids": positions[None]}
    return {**inputs, "attention_mask": None, "packed_seq_params": packed}
