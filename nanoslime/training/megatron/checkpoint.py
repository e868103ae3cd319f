"""Weights, optimizer, random state and step in megatron-core's torch_dist format.

Optimizer state is written in its fully reshardable form, gathered on data-parallel rank 0 over gloo.
"""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from megatron.core.dist_checkpointing.serialization import load_content_metadata
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel.random import _get_all_rng_states, _set_all_rng_states

from nanoslime.training.megatron.parallel import Ranks
from nanoslime.training.skipping import Progress
from nanoslime.types import RunError

logger = logging.getLogger(__name__)

_CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
    "non_homogeneous_layers": True,  # layers apart: where one is frozen, others' optimizer state is not
}


class _InProcessWriter(torch_dist.TorchDistSaveShardedStrategy):
    """torch_dist files written by the rank itself.

    megatron-core 0.16.1 writes in forked processes and collects their results through a spawned
    multiprocessing manager, also when asked to save synchronously: that imports __main__ anew (it hangs
    without a guard there) and outlives a rank that dies.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        rename = torch_dist._replace_state_dict_keys_with_sharded_keys
        renamed = rename(sharded_state_dict, keep_only_main_replica=True)[0]
        planner = torch_dist.MCoreSavePlanner(
            dedup_replicated_tensors=False, flatten_state_dict=False
        )
        writer = dcp.FileSystemWriter(checkpoint_dir)
        state = torch_dist.mcore_to_pyt_state_dict(renamed, False)
        dcp.save(state, storage_writer=writer, planner=planner)


def save(
    path: Path, pieces: list[GPTModel], optimizer: ChainedOptimizer, past: Progress, ranks: Ranks
) -> None:
    """Writes the model's pieces on this rank into the existing empty directory `path`; collective."""
    _make_state(optimizer)
    state = _sharded_state(pieces, optimizer, ranks, _CONTENT, is_loading=False)
    state |= {"progress": asdict(past), "layout": _layout(ranks)}
    dist_checkpointing.save(state, str(path), _InProcessWriter(), content_metadata=_CONTENT)


def load(path: Path, pieces: list[GPTModel], optimizer: ChainedOptimizer, ranks: Ranks) -> Progress:
    """Restores what `save` wrote and returns the progress; collective.

    The random state belongs to a rank, so it is left as it is under another layout than the one that saved.
    Raises RunError for a checkpoint that is damaged or of another model.
    """
    _make_state(optimizer)
    try:
        common = dist_checkpointing.load_common_state_dict(str(path))
        content, layout = (
            load_content_metadata(preloaded_state_dict=common) or _CONTENT,
            common["layout"],
        )
        state = _sharded_state(pieces, optimizer, ranks, content, is_loading=True)
        if layout != _layout(ranks):
            logger.warning(
                "random state not restored: saved by layout %s, now %s", layout, _layout(ranks)
            )
            del state["random"]
        loaded = dist_checkpointing.load(state, str(path))
    except (
        dist_checkpointing.core.CheckpointingException,
        dcp.CheckpointException,
        OSError,
        KeyError,
    ) as e:
        raise RunError(
            f"{path} cannot be loaded as a Megatron checkpoint of this model: {e}"
        ) from e
    for number, piece in enumerate(pieces):
        piece.load_state_dict(loaded["model"][number])
    past = Progress(**loaded["progress"])
    _load_optimizer(optimizer, loaded["optimizer"], past.step - past.num_skipped)
    if "random" in loaded:
        _set_all_rng_states(*loaded["random"])
    return past


def _sharded_state(
    pieces: list[GPTModel],
    optimizer: ChainedOptimizer,
    ranks: Ranks,
    content: dict[str, Any],
    *,
    is_loading: bool,
) -> dict[str, Any]:
    weights = dict(enumerate(piece.sharded_state_dict(metadata=dict(content)) for piece in pieces))
    options = {"is_loading": is_loading, "metadata": dict(content)}
    grid = (ranks.pp_size, ranks.dp_size, ranks.cp_size, ranks.tp_size)
    place = (ranks.pp_rank, ranks.dp_rank, ranks.cp_rank, ranks.tp_rank)
    return {
        "model": weights,
        "optimizer": {
            number: inner.sharded_state_dict(weights, **options) if inner.get_parameters() else {}
            for number, inner in enumerate(optimizer.chained_optimizers)
        },
        "random": ShardedObject("random", _get_all_rng_states(), grid, place),
    }


def _layout(ranks: Ranks) -> str:
    experts = (
        f" ep{ranks.ep_size} etp{ranks.etp_size}" if ranks.ep_size * ranks.etp_size > 1 else ""
    )
    pp = f"pp{ranks.pp_size}x{ranks.vpp_size}"
    return f"tp{ranks.tp_size} cp{ranks.cp_size} {pp} dp{ranks.dp_size}{experts}"


def _make_state(optimizer: ChainedOptimizer) -> None:
    """Moments and step before the first update, which the distributed optimizer does not make by itself."""
    for inner in (each for each in optimizer.chained_optimizers if each.get_parameters()):
        if isinstance(
            inner.optimizer, HybridDeviceOptimizer
        ):  # its own way is a step with random gradients
            for one in inner.optimizer.sub_optimizers:
                for p in (
                    p for group in one.param_groups for p in group["params"] if not one.state[p]
                ):
                    moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                    one.state[p] = {"step": torch.tensor(0.0), **moments}
            inner.optimizer._sync_sub_optimizers_state_to_hdo()
            continue
        inner.init_state_fn(inner.optimizer, inner.config)
        if isinstance(inner.optimizer, torch.optim.AdamW):
            for state in inner.optimizer.state.values():
                state.setdefault("step", torch.tensor(0.0))


def _load_optimizer(optimizer: ChainedOptimizer, loaded: dict[int, Any], updates: int) -> None:
    """Moments and main parameters; the settings remain those of this run.

    The step is the number of `updates`: megatron-core keeps that of rank 0, which may have nothing to train,
    as may each of the optimizers (the second is that of experts) on any rank.
    """
    for number, inner in enumerate(optimizer.chained_optimizers):
        if not inner.get_parameters():
            continue
        by_parameter = isinstance(inner.optimizer, torch.optim.AdamW)
        of_group = (
            {}
            if by_parameter and not isinstance(inner, DistributedOptimizer)
            else {"step": updates}
        )
        groups = [group | of_group for group in inner.optimizer.state_dict()["param_groups"]]
        if isinstance(inner, DistributedOptimizer):
            _load_distributed(inner, groups, loaded[number])
            continue
        own = loaded[number].get("optimizer", loaded[number])
        own["param_groups"] = groups
        if not of_group:
            own["state"]["common_step"] = torch.tensor(float(updates))
        inner.load_state_dict(loaded[number])


def _load_distributed(
    optimizer: DistributedOptimizer, groups: list[dict[str, Any]], loaded: dict[str, Any]
) -> None:
    # megatron-core 0.16.1 with torch's AdamW: it hands one step tensor to all parameters, which would then
    # be counted once for each of them, and it looks for "step" among the sharded tensors, where it is not
    optimizer.load_state_dict({"optimizer": {"param_groups": groups}})
    states = optimizer.optimizer.state
    steps = {key: state.pop("step").clone() for key, state in states.items() if "step" in state}
    with torch.no_grad():
        optimizer.load_parameter_state_from_fully_reshardable(loaded["param_state"])
    for key, step in steps.items():
        states[key]["step"] = step
