"""Seconds that a step of a run takes on a layout, by a simple model; nothing here is measured.

Work over speed, with one constant share of each peak that is reached in practice. Left out are
kernels' own limits, stragglers, rewards, evaluations and checkpoints. It is made for an
order of layouts, and no more.
"""

from dataclasses import dataclass
from math import ceil

from nanoslime.config import RunConfig
from nanoslime.layout import Layout
from nanoslime.models.shape import ModelShape
from tools.memory.estimate import estimate_memory
from tools.memory.parts import EngineGPU

# Assumed shares of the peaks of cluster.gpu_tflops and of the bandwidths.
TRAIN_SHARE = 0.4
BANDWIDTH_SHARE = 0.6
# Assumed time of an all-reduce of little within a node.
ALL_REDUCE_S = 1e-5
# Assumed length of an answer and of a prompt, as a share of the longest.
MEAN_SHARE = 0.5
# Bytes of a number of bfloat16.
_WIDTH = 2


@dataclass(frozen=True, slots=True)
class StepTime:
    """Predicted seconds of one step of the run, which is a rollout and its training."""

    generate_s: float
    train_s: float
    sync_s: float
    # Whether engines sample while the trainers train.
    overlaps: bool

    @property
    def step_s(self) -> float:
        if self.overlaps:
            return max(self.generate_s, self.train_s) + self.sync_s
        return self.generate_s + self.train_s + self.sync_s


def step_time(config: RunConfig, shape: ModelShape, layout: Layout) -> StepTime:
    need = estimate_memory(config, shape, layout.parallel)
    generate_s = 0.0
    sync_s = 0.0
    if need.engine and layout.engines:
        generate_s = _generate_s(config, shape, layout, need.engine)
        sync_s = _sync_s(config, shape)
    train_s = _train_s(config, shape, layout) if layout.trainers else 0.0
    overlaps = config.rollout.max_staleness > 0
    return StepTime(generate_s, train_s, sync_s, overlaps)


def _generate_s(config: RunConfig, shape: ModelShape, layout: Layout, engine: EngineGPU) -> float:
    """An engine decodes as many sequences at once as it caches, one token of each at a time.

    For that it reads its weights once (those of the experts that any token takes) and the cached
    keys and values of each sequence, which decoding waits for (arXiv 2211.05102, section 2); or it
    waits for its arithmetic, 2 FLOPs a parameter and token. Between layers stand two all-reduces of
    the hidden state (arXiv 1909.08053, section 3). The last answer has the longest length.
    """
    cluster = config.cluster
    rollout = config.rollout
    tp = rollout.engine_tp_size
    samples = ceil(_samples(config) / len(layout.engines))
    prompt = MEAN_SHARE * config.data.max_prompt_tokens
    response = MEAN_SHARE * rollout.max_new_tokens
    room = int(engine.cached_tokens / (prompt + response))
    batch = max(1, min(samples, room, rollout.max_inflight))
    tokens = samples * response
    rounds = max(tokens / batch, rollout.max_new_tokens)
    speed = cluster.gpu_memory_gb_s * 1e9 * BANDWIDTH_SHARE
    cache_read = tokens * (prompt + response / 2) * engine.kv_bytes_per_token
    read_s = (rounds * _read_weights(shape, batch) / tp + cache_read) / speed
    flops = 2 * active_parameters(shape) * tokens / tp
    arithmetic_s = flops / (cluster.gpu_tflops * 1e12 * TRAIN_SHARE)
    reduced = 2 * shape.num_layers * tokens * shape.hidden_size * _WIDTH * 2 * (tp - 1) / tp
    reduce_s = reduced / (cluster.nvlink_gb_s * 1e9 * BANDWIDTH_SHARE)
    if tp > 1:
        reduce_s += rounds * 2 * shape.num_layers * ALL_REDUCE_S
    return max(read_s, arithmetic_s) + reduce_s


def _read_weights(shape: ModelShape, batch: int) -> float:
    """Bytes of weights that a batch of tokens takes: of experts those that one or more of its
    tokens choose, if they choose evenly."""
    experts = shape.num_expert_parameters
    dense = shape.num_parameters - experts
    share = 1.0
    if shape.moe:
        of_token = shape.moe.num_experts_per_token / shape.moe.num_experts
        share = 1 - (1 - of_token) ** batch
    return _WIDTH * (dense + share * experts)


def active_parameters(shape: ModelShape) -> float:
    """Parameters that one token is multiplied with, the input embedding aside."""
    experts = shape.num_expert_parameters
    active = shape.num_parameters - experts
    if shape.moe:
        active += experts * shape.moe.num_experts_per_token / shape.moe.num_experts
    if not shape.tie_word_embeddings:
        active -= shape.num_embedding_parameters
    return active


def _train_s(config: RunConfig, shape: ModelShape, layout: Layout) -> float:
    """Arithmetic with its pipeline bubble, and what is sent between ranks.

    A pass forward is 2 FLOPs a parameter and token, a pass backward 4 (arXiv 2001.08361, section
    2.1), recomputation 2 more; attention adds its share of the length at which it costs as much.
    A pipeline of p stages and m micro-batches stands idle for (p - 1) / m of its work, over the
    number of chunks (arXiv 2104.04473, section 2.2).
    """
    training = config.training
    dims = layout.parallel
    mean_length = MEAN_SHARE * (config.data.max_prompt_tokens + config.rollout.max_new_tokens)
    tokens = _samples(config) * mean_length
    passes = 8 if training.recompute else 6
    passes += 2 * (config.old_logprobs == "recomputed") + 2 * config.algorithm.needs_reference
    attention = 1 + mean_length / shape.attention_parity_tokens
    flops = passes * active_parameters(shape) * tokens * attention
    speed = config.cluster.gpu_tflops * 1e12 * TRAIN_SHARE * len(layout.trainers)
    of_step = tokens / training.num_steps_per_rollout / dims.dp / dims.cp
    microbatches = max(1.0, of_step / training.max_tokens_per_microbatch)
    bubble = (dims.pp - 1) / microbatches / training.vpp_size
    arithmetic_s = flops / speed * (1 + bubble)
    return arithmetic_s + _between_ranks_s(config, shape, layout, tokens)


def _between_ranks_s(config: RunConfig, shape: ModelShape, layout: Layout, tokens: float) -> float:
    """Tensor parallelism has four all-reduces of a layer's hidden state for each token (arXiv
    1909.08053, section 3), expert parallelism four all-to-alls of what its experts get (arXiv
    2006.16668, section 3.2), a pipeline two sends between stages; an optimizer step reduces
    gradients of 4 bytes and gathers weights of 2 over the data parallel ranks."""
    cluster = config.cluster
    dims = layout.parallel
    nvlink = cluster.nvlink_gb_s * 1e9 * BANDWIDTH_SHARE
    network = cluster.network_gb_s * 1e9 * BANDWIDTH_SHARE
    of_rank = tokens / dims.dp / dims.cp
    hidden = shape.hidden_size * _WIDTH
    layers = shape.num_layers / dims.pp
    in_tp = 4 * layers * of_rank * hidden * 2 * (dims.tp - 1) / dims.tp / nvlink
    in_pp = 2 * of_rank * hidden / dims.tp / network if dims.pp > 1 else 0.0
    in_ep = 0.0
    if shape.moe and dims.ep > 1:
        link = nvlink if dims.ep <= layout.slots_per_node else network
        sent = hidden * shape.moe.num_experts_per_token * (dims.ep - 1) / dims.ep
        in_ep = 4 * layers * of_rank * sent / dims.tp / link
    one_node = len(layout.trainers) <= layout.slots_per_node
    dp_link = nvlink if one_node else network
    experts = shape.num_expert_parameters / dims.ep
    dense = (shape.num_parameters - shape.num_expert_parameters) / dims.tp
    of_state = (dense + experts) / dims.pp
    in_dp = 6 * of_state * (dims.dp - 1) / dims.dp / dp_link
    return in_tp + in_pp + in_ep + config.training.num_steps_per_rollout * in_dp


def _sync_s(config: RunConfig, shape: ModelShape) -> float:
    """All weights go to each engine once; with cluster.colocate they stay on their GPUs' node."""
    cluster = config.cluster
    stays = cluster.colocate or cluster.nodes == 1
    link = cluster.nvlink_gb_s if stays else cluster.network_gb_s
    return _WIDTH * shape.num_parameters / (link * 1e9 * BANDWIDTH_SHARE)


def _samples(config: RunConfig) -> int:
    return config.rollout.rollout_batch_size * config.rollout.n_samples_per_prompt
