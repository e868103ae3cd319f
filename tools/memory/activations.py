"""Bytes that backward functions keep of the micro-batches in flight, on each pipeline rank.

A layer keeps, for each token (w: bytes of a number in model.dtype; H: hidden size; Q, K: queries
and keys of a rank; I: its part of the MLP):

    norms       two times the input, the normalized values and the output, H each
    attention   queries, keys and values as they come from their projection, and again with norm
                and rotation; the attended values Q and a float32 for each head
    MLP         gate and up, and what comes between them and the last product

What of it is kept, and in which type, depends on the kernels, which `KERNELS` lists. Numbers of
"cpu-local" and "fsdp-sdpa" were measured tensor by tensor (tools/saved_tensors.py), those of
"cuda-local" and "fsdp-flash" give the peaks of an H200 (tools/BENCHMARKS.md); those of
"transformer-engine" are from its sources and were never measured.
"""

from dataclasses import dataclass
from typing import Literal

from nanoslime.config import RunConfig
from nanoslime.models.parallel_sizes import ParallelDims, PipelineSizes
from nanoslime.models.shape import MLA, ModelShape
from tools.memory.states import width_of

# Token ids where the embedding is. Where the logprobs are: ids, masks, weights, old and new
# logprobs, ratios and losses of each token.
_BYTES_OF_IDS = 8
_BYTES_OF_LOSS = 56
# A rank runs fewer than two groups of micro-batches before its first backward, and what it holds
# then comes back with each group.
_NUM_GROUPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """What the kernels of a layer keep for the backward pass."""

    # A norm keeps its input and output only; otherwise a float32 copy of its input too.
    fused_norms: bool
    # Megatron projects queries, keys and values in one product, whose output stays as a whole.
    fused_qkv: bool
    # Bytes of a normalized value, which a norm that is not fused keeps; 0: as model.dtype.
    normalized: int = 0
    # How many times I the MLP and an expert keep.
    mlp: int
    expert: int
    # Copies of the attended values: a loop over sequences joins theirs once more.
    attended: int
    # Copies of a token's cosines and sines in each layer, and once for all layers.
    rotations: int = 0
    shared_rotations: int = 0
    # Latent attention, where keys and values differ in size: all scores are kept in float32,
    # values are padded to the size of keys, or neither.
    latent: Literal["scores", "padded", "plain"] = "plain"
    # Under context parallelism a rank has the keys and values of all ranks, and a mask.
    gathers_keys: bool = False


KERNELS = {
    "cpu-local": Kernels(
        fused_norms=False,
        fused_qkv=True,
        normalized=4,
        mlp=5,
        expert=6,
        attended=2,
        rotations=4,
        latent="scores",
        gathers_keys=True,
    ),
    "cuda-local": Kernels(
        fused_norms=True,
        fused_qkv=True,
        mlp=3,
        expert=3,
        attended=1,
        rotations=4,
        latent="padded",
        gathers_keys=True,
    ),
    "transformer-engine": Kernels(fused_norms=True, fused_qkv=True, mlp=3, expert=3, attended=1),
    "fsdp-sdpa": Kernels(
        fused_norms=False, fused_qkv=False, mlp=4, expert=4, attended=2, shared_rotations=2
    ),
    "fsdp-flash": Kernels(
        fused_norms=False, fused_qkv=False, mlp=4, expert=4, attended=1, shared_rotations=2
    ),
}


def kernels_of(config: RunConfig) -> Kernels:
    """The kernels of the trainers. A GPU is taken to have Transformer Engine, unless
    training.allow_slow says that it may be missing."""
    on_gpu = config.cluster.device == "cuda"
    if config.training.backend == "fsdp":
        return KERNELS["fsdp-flash" if on_gpu and width_of(config) < 4 else "fsdp-sdpa"]
    if not on_gpu:
        return KERNELS["cpu-local"]
    return KERNELS["cuda-local" if config.training.allow_slow else "transformer-engine"]


@dataclass(frozen=True, slots=True)
class Microbatch:
    """What of a micro-batch is on one context-parallel rank."""

    tokens: int
    # Whole length of its sequences.
    length: int


def activations_of_ranks(
    config: RunConfig, shape: ModelShape, parallel: ParallelDims, microbatch: Microbatch
) -> list[int]:
    """[pp_size]: bytes that a rank of each pipeline stage keeps when most micro-batches are in
    flight.

    With training.recompute a layer keeps its input, and one layer at a time everything.
    """
    layer = _Layer(config, shape, parallel, kernels_of(config), microbatch.length)
    moe_layers = set(shape.moe_layers)
    kinds = [number in moe_layers for number in range(shape.num_layers)]
    # Layers of one kind, with experts or without, are alike.
    kept_of_kinds = {is_moe: layer.kept(is_moe=is_moe) for is_moe in set(kinds)}
    pipeline = PipelineSizes.of(config.training)
    stages = pipeline.stages(shape.num_layers)
    found = []
    for rank in range(pipeline.pp_size):
        chunks = stages[rank :: pipeline.pp_size]
        of_layers = [sum(kept_of_kinds[kinds[number]] for number in chunk) for chunk in chunks]
        is_last_rank = rank == pipeline.pp_size - 1
        of_ends = [
            layer.ends(
                is_first=rank == 0 and chunk == 0,
                is_last=is_last_rank and chunk == pipeline.vpp_size - 1,
            )
            for chunk in range(pipeline.vpp_size)
        ]
        at_once = 0.0
        if config.training.recompute:
            found_kinds = {kinds[number] for chunk in chunks for number in chunk}
            at_once = max(layer.whole(is_moe=is_moe) for is_moe in found_kinds)
        kept = 0.0
        for waiting in _waiting_chunks(pipeline, rank):
            in_layers = sum(count * each for count, each in zip(waiting, of_layers, strict=True))
            at_ends = sum(count * each for count, each in zip(waiting, of_ends, strict=True))
            # The backward pass is done with the loss before it comes to a layer.
            kept = max(kept, in_layers + max(at_ends, at_once))
        found.append(int(kept * microbatch.tokens))
    return found


def _waiting_chunks(pipeline: PipelineSizes, rank: int) -> set[tuple[int, ...]]:
    """[vpp_size] each: of how many micro-batches each chunk of a rank waits for the backward pass,
    at each moment of a step with many micro-batches.

    Rank r holds pp_size - r micro-batches. Interleaved, it has run 2 (pp_size - r - 1) + (vpp_size
    - 1) pp_size + 1 of its chunks before the first backward (arXiv 2104.04473, section 2.2):
    pp_size micro-batches of a chunk before the next chunk, and backward from the last chunk. From
    then on a backward follows each forward. Where one of its chunks has more layers than another,
    most is held later than before the first backward.
    """
    ahead = pipeline.pp_size - rank - 1
    if pipeline.vpp_size > 1:
        ahead = 2 * ahead + (pipeline.vpp_size - 1) * pipeline.pp_size
    group = [chunk for chunk in range(pipeline.vpp_size) for _ in range(pipeline.pp_size)]
    order = group * _NUM_GROUPS
    waiting = [0] * pipeline.vpp_size
    found = set()
    for number, chunk in enumerate(order):
        waiting[chunk] += 1
        found.add(tuple(waiting))
        if number >= ahead:
            waiting[pipeline.vpp_size - 1 - order[number - ahead]] -= 1
    return found


@dataclass(frozen=True, slots=True)
class _Layer:
    """Bytes that layers keep for one token on one rank."""

    config: RunConfig
    shape: ModelShape
    parallel: ParallelDims
    kernels: Kernels
    # Whole length of a sequence.
    length: int

    @property
    def width(self) -> int:
        return width_of(self.config)

    @property
    def sequence_ways(self) -> int:
        """By how many the tokens are divided outside of tensor-parallel products."""
        return self.parallel.tp if self.config.training.sequence_parallel else 1

    def kept(self, *, is_moe: bool) -> float:
        """Between forward and backward."""
        if self.config.training.recompute:
            return self.width * self.shape.hidden_size / self.sequence_ways
        return self.whole(is_moe=is_moe)

    def whole(self, *, is_moe: bool) -> float:
        """Without recomputation."""
        norms = 2 * self._norm(self.shape.hidden_size) / self.sequence_ways
        attention = self._attention() if self.shape.mla is None else self._latent(self.shape.mla)
        if is_moe:
            return norms + attention + self._experts()
        mlp = self.kernels.mlp * self.width * self.shape.intermediate_size / self.parallel.tp
        return norms + attention + mlp

    def ends(self, *, is_first: bool, is_last: bool) -> float:
        """Outside of layers: the ids; the last norm, the hidden states for the logprobs, which
        are whole on each rank, and the loss."""
        kept = 0.0
        if is_first:
            kept += _BYTES_OF_IDS
            kept += self.kernels.shared_rotations * self.width * self.shape.head_dim
        if is_last:
            hidden = self.shape.hidden_size
            kept += self._before_output(hidden) / self.sequence_ways + 4
            kept += self.width * hidden + _BYTES_OF_LOSS
        return kept

    def _norm(self, size: int) -> float:
        """Input, normalized values and output of `size` numbers, and a float32."""
        return self._before_output(size) + self.width * size + 4

    def _before_output(self, numbers: float) -> float:
        """Of a norm's input and its normalized values; a fused norm keeps the input only."""
        if self.kernels.fused_norms:
            return self.width * numbers
        return (4 + (self.kernels.normalized or self.width)) * numbers

    def _attention(self) -> float:
        shape = self.shape
        heads = shape.num_attention_heads / self.parallel.tp
        groups = shape.num_key_value_heads / self.parallel.tp
        queries = heads * shape.head_dim
        keys = groups * shape.head_dim
        # As they are multiplied; values may be a part of the projection's output.
        kept = self.width * (queries + keys)
        keeps_output = self.kernels.fused_qkv
        if self.kernels.gathers_keys and self.parallel.cp > 1:
            # Keys and values of all ranks, and a mask of numbers.
            kept += self.width * ((2 * self.parallel.cp - 1) * keys + self.length)
            keeps_output = shape.qk_norm and (self.kernels.fused_norms or self.width == 4)
        if keeps_output:
            kept += self.width * (queries + 2 * keys)
        elif not self.kernels.fused_qkv:
            kept += self.width * keys
        if shape.qk_norm:
            kept += self._query_key_norms(queries, keys) + 4 * (heads + groups)
        kept += self.kernels.attended * self.width * queries + 4 * heads
        return kept + self.kernels.rotations * self.width * shape.head_dim

    def _query_key_norms(self, queries: float, keys: float) -> float:
        """Their outputs are not kept: rotation needs cosines and sines only."""
        if self.kernels.fused_norms:
            return self.width * queries  # keys are read in place
        kept = self._before_output(1) * (queries + keys)
        if self.kernels.fused_qkv and self.width == 4:
            kept -= 4 * keys
        return kept

    def _latent(self, mla: MLA) -> float:
        """Latent attention (arXiv 2405.04434): low ranks are whole on each rank."""
        heads = self.shape.num_attention_heads / self.parallel.tp
        size = mla.qk_nope_head_dim + mla.qk_rope_head_dim
        kept = self._norm(mla.kv_lora_rank)
        if mla.q_lora_rank is not None:
            kept += self._norm(mla.q_lora_rank)
        kept += self.kernels.rotations * self.width * mla.qk_rope_head_dim
        if self.kernels.latent == "scores":
            # In float32: queries, keys, values and scores.
            kept += 4 * heads * (2 * size + mla.v_head_dim + self.length)
            return kept + self.width * heads * mla.v_head_dim
        values = mla.qk_nope_head_dim + mla.v_head_dim
        if self.kernels.latent == "padded":
            values = 2 * size  # the values and what is attended are padded to the size of keys
        return kept + self.width * heads * (2 * size + values + mla.v_head_dim) + 4 * heads

    def _experts(self) -> float:
        """Experts that have equally many tokens each; a rank with more keeps more."""
        moe = self.shape.moe
        assert moe is not None
        hidden = self.shape.hidden_size
        inner = self.kernels.expert * moe.intermediate_size
        chosen = moe.num_experts_per_token
        # With tensor parallelism in an expert its tokens are on all of these ranks.
        routed = self.width * chosen * (hidden * self.config.training.etp_size + inner)
        scores = 4 * moe.num_experts + 32 * chosen
        shared = self.kernels.mlp * self.width * moe.shared_intermediate_size / self.parallel.tp
        return (routed + scores) / self.sequence_ways + shared
