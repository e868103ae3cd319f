"""Weights, optimizer, random state and step in megatron-core's torch_dist format.

Every rank writes and reads its own part: a share of what data-parallel ranks have alike,
and its own range of the distributed optimizer's state (optimizer_shards.py).
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel.random import _get_all_rng_states, _set_all_rng_states

from nanoslime.training.megatron import optimizer_shards
from nanoslime.training.megatron.parallel import Ranks
from nanoslime.training.skipping import StepHistory
from nanoslime.types import RunError

logger = logging.getLogger(__name__)

_CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    # Layers are kept apart: where one is frozen, the others still have optimizer state.
    "non_homogeneous_layers": True,
}


@dataclass(frozen=True, slots=True)
class Trained:
    """What a checkpoint holds of a rank, and where the rank stands."""

    model_chunks: list[GPTModel]
    optimizer: ChainedOptimizer
    ranks: Ranks


class InProcessWriter(torch_dist.TorchDistSaveShardedStrategy):
    """Writes torch_dist files in the rank itself.

    megatron-core 0.19.2 collects the results of its writers through a spawned
    multiprocessing manager, also when asked to save synchronously: that imports
    __main__ anew (it hangs without a guard there) and outlives a rank that dies.
    """

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        by_key, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, keep_only_main_replica=True
        )
        state = torch_dist.mcore_to_pyt_state_dict(by_key, is_loading=False)
        planner = torch_dist.MCoreSavePlanner(
            dedup_replicated_tensors=False, flatten_state_dict=False
        )
        writer = dcp.FileSystemWriter(checkpoint_dir)
        dcp.save(state, storage_writer=writer, planner=planner)


def save(path: Path, trained: Trained, history: StepHistory) -> None:
    """Writes this rank's state into the existing empty directory `path`; collective."""
    _make_state(trained.optimizer)
    state = _sharded_state(trained, is_loading=False)
    state["step_history"] = asdict(history)
    state["layout"] = _layout(trained.ranks)
    copies = parallel_state.get_data_parallel_group(with_context_parallel=True)
    writer = FullyParallelSaveStrategyWrapper(InProcessWriter(), copies)
    dist_checkpointing.save(state, str(path), writer, content_metadata=_CONTENT)


def load(path: Path, trained: Trained) -> StepHistory:
    """Restores what `save` wrote and returns the step history; collective.

    The random state belongs to a rank. A layout other than the one that saved leaves it
    as it is. Raises RunError for a checkpoint that is damaged or of another model.
    """
    _make_state(trained.optimizer)
    try:
        loaded = _read(path, trained)
        history = StepHistory(**loaded["step_history"])
    except (CheckpointingException, dcp.CheckpointException, OSError, KeyError) as e:
        raise RunError(
            f"{path} cannot be loaded as a Megatron checkpoint of this model: {_reason(e)}"
        ) from e
    for number, chunk in enumerate(trained.model_chunks):
        chunk.load_state_dict(loaded["model"][number])
    # A rank with nothing to train has no state of an optimizer.
    state = loaded.get("optimizer", {})
    _load_optimizer(trained.optimizer, state, history.optimizer_step - history.num_skipped)
    if "random" in loaded:
        _set_all_rng_states(*loaded["random"])
    return history


def _reason(error: BaseException) -> str:
    """The beginning of what a rank said: megatron-core goes on to list all tensors there are."""
    if isinstance(error, dcp.CheckpointException):
        error, _ = next(iter(error.failures.values()))
    return shorten(str(error), 300)


def _read(path: Path, trained: Trained) -> dict[str, Any]:
    """Reads the state in `path` for this rank; collective.

    It has "random" only where the same layout saved it.
    """
    common = dist_checkpointing.load_common_state_dict(str(path))
    state = _sharded_state(trained, is_loading=True)
    before = common["layout"]
    now = _layout(trained.ranks)
    if before != now:
        logger.warning("random state not restored: saved by layout %s, now %s", before, now)
        del state["random"]
    return dist_checkpointing.load(state, str(path))


def _sharded_state(trained: Trained, *, is_loading: bool) -> dict[str, Any]:
    """This rank's state, and where each of its tensors lies in the whole."""
    optimizer = trained.optimizer
    ranks = trained.ranks
    weights = {}
    for number, chunk in enumerate(trained.model_chunks):
        weights[number] = chunk.sharded_state_dict(metadata=dict(_CONTENT))
    moments = {number: {} for number in range(len(optimizer.chained_optimizers))}
    for number, inner in _training(optimizer):
        if isinstance(inner, DistributedOptimizer):
            moments[number] = optimizer_shards.sharded(inner, weights)
        else:
            moments[number] = inner.sharded_state_dict(
                weights, is_loading=is_loading, metadata=dict(_CONTENT)
            )
    grid = (ranks.pp_size, ranks.dp_size, ranks.cp_size, ranks.tp_size)
    place = (ranks.place.pp_rank, ranks.dp_rank, ranks.cp_rank, ranks.place.tp_rank)
    random_state = ShardedObject("random", _get_all_rng_states(), grid, place)
    return {"model": weights, "optimizer": moments, "random": random_state}


def _training(optimizer: ChainedOptimizer) -> list[tuple[int, MegatronOptimizer]]:
    """The optimizers that have something to train on this rank, by their numbers.

    Any of them may have nothing (the second one is for experts).
    """
    chained = enumerate(optimizer.chained_optimizers)
    return [(number, inner) for number, inner in chained if inner.get_parameters()]


def _layout(ranks: Ranks) -> str:
    pipeline = f"pp{ranks.pp_size}x{ranks.vpp_size}"
    layout = f"tp{ranks.tp_size} cp{ranks.cp_size} {pipeline} dp{ranks.dp_size}"
    if ranks.ep_size * ranks.etp_size > 1:
        layout += f" ep{ranks.ep_size} etp{ranks.etp_size}"
    return layout


def _make_state(optimizer: ChainedOptimizer) -> None:
    """Makes moments and step before the first update, as megatron-core does not."""
    for _, inner in _training(optimizer):
        if isinstance(inner.optimizer, HybridDeviceOptimizer):
            _make_offloaded_state(inner.optimizer)
            continue
        inner.init_state_fn(inner.optimizer, inner.config)
        if isinstance(inner.optimizer, torch.optim.AdamW):
            for state in inner.optimizer.state.values():
                state.setdefault("step", torch.tensor(0.0))


def _make_offloaded_state(optimizer: HybridDeviceOptimizer) -> None:
    """Makes zero moments; megatron-core's own way is an update with random gradients."""
    for sub_optimizer in optimizer.sub_optimizers:
        for group in sub_optimizer.param_groups:
            for parameter in group["params"]:
                if not sub_optimizer.state[parameter]:
                    sub_optimizer.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
    optimizer._sync_sub_optimizers_state_to_hdo()


def _load_optimizer(optimizer: ChainedOptimizer, loaded: dict[int, Any], num_updates: int) -> None:
    """Restores moments and main parameters; the settings remain those of this run.

    The optimizer's step becomes `num_updates`, because megatron-core keeps the step of
    rank 0. Rank 0 may have nothing to train.
    """
    for number, inner in _training(optimizer):
        if isinstance(inner, DistributedOptimizer):
            _load_distributed(inner, loaded[number], num_updates)
        else:
            _load_plain(inner, loaded[number], num_updates)


def _load_plain(optimizer: MegatronOptimizer, loaded: dict[str, Any], num_updates: int) -> None:
    # In bfloat16 the moments lie one level deeper, beside the main parameters.
    state = loaded.get("optimizer", loaded)
    groups = optimizer.optimizer.state_dict()["param_groups"]
    if isinstance(optimizer.optimizer, torch.optim.AdamW):
        # torch keeps a step for each parameter, Transformer Engine's and apex's Adam
        # one for a group.
        state["state"]["common_step"] = torch.tensor(float(num_updates))
    else:
        groups = [{**group, "step": num_updates} for group in groups]
    state["param_groups"] = groups
    optimizer.load_state_dict(loaded)


def _load_distributed(
    optimizer: DistributedOptimizer, loaded: dict[str, Any], num_updates: int
) -> None:
    # Transformer Engine's and apex's Adam keep a step for a group, torch's for a parameter.
    for group in optimizer.optimizer.param_groups:
        group["step"] = num_updates
    for state in optimizer.optimizer.state.values():
        if "step" in state:
            state["step"].fill_(num_updates)
    optimizer_shards.put(optimizer, loaded)
