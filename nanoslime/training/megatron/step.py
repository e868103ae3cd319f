"""Packed micro-batches through Megatron's pipeline schedules: logprobs, and the gradient of a loss.

TrainBatch -> MicroBatch [T] -> GPTModel (thd) -> logits [T, V / tp] -> logprobs [T] -> loss / denominator
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel as DDP
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nanoslime.batch import MicroBatch, TrainBatch
from nanoslime.models.rules import padded_vocab_size
from nanoslime.models.shape import ModelShape
from nanoslime.training.backend import Algorithm
from nanoslime.training.logprobs import token_logprobs
from nanoslime.training.megatron.parallel import Ranks
from nanoslime.training.metrics import MetricSums


class Pipeline:
    """This rank's stage of the model, driven over the micro-batches of a TrainBatch."""

    def __init__(self, model: DDP, shape: ModelShape, ranks: Ranks, device: torch.device) -> None:
        self.model, self._shape, self._ranks, self._device = model, shape, ranks, device
        self._pad_to = ranks.tp_size if model.config.sequence_parallel else 1

    def logprobs(self, shard: TrainBatch) -> list[Tensor]:
        """[T] per micro-batch of `shard` on the last stage, on the CPU; empty elsewhere."""

        def finish(batch: MicroBatch, logits: Tensor, non_loss_data: bool) -> Tensor:
            return self._token_logprobs(batch, logits).cpu()

        return self._run(shard, finish, forward_only=True, collect_non_loss_data=True)

    def gradients(self, shard: TrainBatch, algorithm: Algorithm) -> dict[str, float] | None:
        """Fills the gradient buffers, summed over ranks; metrics with train/loss on the last stage."""
        sums = MetricSums()

        def finish(batch: MicroBatch, logits: Tensor) -> tuple[Tensor, Tensor, None]:
            logprobs = self._token_logprobs(batch, logits)
            loss, metrics = algorithm.loss(logprobs, None, batch)
            sums.add({"train/loss": loss, **metrics}, logprobs, batch)
            num_tokens = torch.zeros([], dtype=torch.int, device=logits.device)
            return loss / batch.denominator, num_tokens, None

        self.model.zero_grad_buffer()
        self._run(shard, finish, forward_only=False)
        if not self._ranks.is_last_stage:
            return None
        return sums.reduce(self._ranks.dp_group, shard.denominator, shard.num_tokens)

    def _run(self, shard: TrainBatch, finish: Callable[..., Any], **options: Any) -> list[Any]:
        """What `finish(microbatch, logits)` returned for each micro-batch, on the last stage."""

        def forward(batches: Iterator[MicroBatch], model: DDP) -> tuple[Tensor, Callable[..., Any]]:
            batch = next(batches)
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

    def _token_logprobs(self, batch: MicroBatch, logits: Tensor) -> Tensor:
        columns = padded_vocab_size(self._shape, self._ranks.tp_size) // self._ranks.tp_size
        return token_logprobs(
            logits[0, : len(batch.token_ids)],
            batch.token_ids,
            batch.cu_seqlens,
            temperature=batch.temperature,
            vocab_size=self._shape.vocab_size,
            vocab_start=self._ranks.tp_rank * columns,
            tp_group=self._ranks.tp_group if self._ranks.tp_size > 1 else None,
        )


def packed_inputs(tokens: Tensor, positions: Tensor, bounds: Tensor) -> dict[str, Any]:
    """GPTModel's arguments for sequences one after the other: [T], [T], and [N + 1], where each begins."""
    longest = int(bounds.diff().max())
    ends = dict(cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
    packed = PackedSeqParams(qkv_format="thd", **ends)
    inputs = {"input_ids": tokens[None], "position_ids": positions[None]}
    return {**inputs, "attention_mask": None, "packed_seq_params": packed}
