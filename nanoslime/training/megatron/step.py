"""Packed micro-batches through Megatron's pipeline schedules: logprobs, and the gradient of a loss.

TrainBatch -> MicroBatch [T] -> GPTModel (thd) -> hidden [T, H] -> logprobs [T] -> loss / denominator
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
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
from nanoslime.training.logprobs import token_logprobs
from nanoslime.training.megatron.model import unwrap
from nanoslime.training.megatron.parallel import Ranks
from nanoslime.training.metrics import MetricSums


class Pipeline:
    """This rank's stage of the model, driven over the micro-batches of a TrainBatch."""

    def __init__(self, model: DDP, shape: ModelShape, ranks: Ranks, device: torch.device) -> None:
        self.model, self._shape, self._ranks, self._device = model, shape, ranks, device
        self._pad_to = ranks.tp_size if model.config.sequence_parallel else 1

    def logprobs(self, shard: TrainBatch) -> list[Tensor]:
        """[T] per micro-batch of `shard` on the last stage, on the CPU; empty elsewhere."""

        def finish(batch: MicroBatch, hidden: Tensor, non_loss_data: bool) -> Tensor:
            return self._token_logprobs(batch, hidden)[0].cpu()

        return self._run(shard, finish, forward_only=True, collect_non_loss_data=True)

    def gradients(self, shard: TrainBatch, algorithm: Algorithm) -> dict[str, float] | None:
        """Fills the gradient buffers, summed over ranks; metrics with train/loss on the last stage."""
        sums = MetricSums()

        def finish(batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, None]:
            logprobs, entropy = self._token_logprobs(batch, hidden, with_entropy=algorithm.needs_entropy)
            loss, metrics = algorithm.loss(logprobs, entropy, batch)
            sums.add({"train/loss": loss, **metrics}, logprobs, batch)
            num_tokens = torch.zeros([], dtype=torch.int, device=hidden.device)
            return loss / batch.denominator, num_tokens, None

        self.model.zero_grad_buffer()
        self._run(shard, finish, forward_only=False)
        if not self._ranks.is_last_stage:
            return None
        return sums.reduce(self._ranks.dp_group, shard.denominator, shard.num_tokens)

    def _run(self, shard: TrainBatch, finish: Callable[..., Any], **options: Any) -> list[Any]:
        """What `finish(microbatch, hidden)` returned for each micro-batch, on the last stage."""

        def forward(batches: Iterator[MicroBatch], model: DDP) -> tuple[Tensor, Callable[..., Any]]:
            batch = next(batches)
            with _without_output_layer(unwrap(model)):
                return model(**self._inputs(batch)), partial(finish, batch)

        return get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=(shard.microbatch(i).to(self._device) for i in shard.microbatches),
            model=self.model,
            num_microbatches=len(shard.microbatches),
            seq_length=1,  # the stages tell one another the shapes (variable_seq_lengths)
            micro_batch_size=1,
            **options,
        )

    def _inputs(self, batch: MicroBatch) -> dict[str, Any]:
        """The pack as one row [1, T] of thd sequences; with sequence parallelism tp_size divides T."""
        tokens, positions, bounds = batch.token_ids, batch.positions, batch.cu_seqlens
        padding = -len(tokens) % self._pad_to
        if padding:  # one more sequence, which nobody reads
            tokens, positions = F.pad(tokens, (0, padding)), F.pad(positions, (0, padding))
            bounds = torch.cat([bounds, bounds[-1:] + padding])
        return packed_inputs(tokens, positions, bounds)

    def _token_logprobs(
        self, batch: MicroBatch, hidden: Tensor, *, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """[T] each, from the hidden states [T / tp or T, 1, H] of the last layer."""
        gpt = unwrap(self.model)
        if gpt.config.sequence_parallel:  # the gradient is whole on each rank, which takes its part of it
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        tied = gpt.share_embeddings_and_output_weights
        weight = gpt.shared_embedding_or_output_weight() if tied else gpt.output_layer.weight
        columns = padded_vocab_size(self._shape, self._ranks.tp_size) // self._ranks.tp_size
        return token_logprobs(
            hidden[: len(batch.token_ids), 0].to(weight.dtype),  # Float16Module returns float32
            weight,
            batch.token_ids,
            batch.cu_seqlens,
            temperature=batch.temperature,
            vocab_size=self._shape.vocab_size,
            vocab_start=self._ranks.tp_rank * columns,
            tp_group=self._ranks.tp_group if self._ranks.tp_size > 1 else None,
            with_entropy=with_entropy,
        )


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
    ends = dict(cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
    packed = PackedSeqParams(qkv_format="thd", **ends)
    inputs = {"input_ids": tokens[None], "position_ids": positions[None]}
    return {**inputs, "attention_mask": None, "packed_seq_params": packed}
