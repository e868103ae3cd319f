"""Sizes of the parallel groups: which ones a model allows, and where a rank lies along them.

The short names are Megatron's: tp (tensor), pp (pipeline), vpp (virtual
pipeline, which interleaves stages), cp (context), dp (data), ep (expert) and etp
(tensor parallelism within an expert).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanoslime.models.shape import ModelShape
from nanoslime.types import RunError

if TYPE_CHECKING:  # a conversion would take longer to import the configuration than to start
    from nanoslime.config import TrainingConfig


@dataclass(frozen=True, slots=True)
class ParallelDims:
    tp: int
    pp: int
    cp: int
    ep: int
    dp: int

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    def coordinates(self, rank: int) -> dict[str, int]:
        """The rank's place along tp, cp, dp and pp; tp runs fastest."""
        sizes = {"tp": self.tp, "cp": self.cp, "dp": self.dp, "pp": self.pp}
        place = {}
        for name, size in sizes.items():
            rank, place[name] = divmod(rank, size)
        return place


def tp_sizes(shape: ModelShape, slots: int | None = None) -> list[int]:
    """The sizes that tensor parallelism may have; where `slots` of a node are given,
    they divide these."""
    cut = _sizes_cut_by_tp(shape).values()
    largest = slots or shape.num_attention_heads
    return [tp for tp in divisors(largest) if all(size % tp == 0 for size in cut)]


def check_tp_size(shape: ModelShape, tp_size: int, slots: int | None = None) -> None:
    """Raises RunError where `tp_size` does not divide what it cuts, or the `slots` of a node."""
    choices = one_of(tp_sizes(shape, slots))
    for name, size in _sizes_cut_by_tp(shape).items():
        if size % tp_size:
            raise RunError(
                f"training.tp_size={tp_size} does not divide {name}={size}; choose {choices}"
            )
    if slots and slots % tp_size:
        raise RunError(
            f"training.tp_size={tp_size}: a tensor-parallel group must lie in one node, and "
            f"{tp_size} does not divide its {slots} slots; choose {choices}"
        )


def _sizes_cut_by_tp(shape: ModelShape) -> dict[str, int]:
    """Sizes of the model that tensor parallelism divides: heads, query groups and MLPs."""
    sizes = {"num_attention_heads": shape.num_attention_heads}
    if not shape.mla:
        sizes["num_key_value_heads"] = shape.num_key_value_heads
    sizes["intermediate_size"] = shape.intermediate_size
    if shape.moe:
        sizes["shared_intermediate_size"] = shape.moe.shared_intermediate_size
    return sizes


def check_pp_size(shape: ModelShape, pp_size: int, vpp_size: int) -> None:
    """Raises RunError where the layers cannot be cut into `pp_size` stages of
    `vpp_size` chunks each."""
    layers = shape.num_layers
    if layers % pp_size:
        raise RunError(
            f"training.pp_size={pp_size} does not divide num_layers={layers}; "
            f"choose {one_of(divisors(layers))}"
        )
    if pp_size == 1 and vpp_size > 1:
        raise RunError(
            f"training.vpp_size={vpp_size} needs training.pp_size of 2 or more; choose 1"
        )
    layers_of_stage = layers // pp_size
    if layers_of_stage % vpp_size:
        raise RunError(
            f"training.vpp_size={vpp_size} does not divide the {layers_of_stage} layers of a rank "
            f"with training.pp_size={pp_size}; choose {one_of(divisors(layers_of_stage))}"
        )


def check_experts(shape: ModelShape, config: TrainingConfig, stage_ranks: int) -> None:
    """Raises RunError where the experts do not fit the sizes of `config` or the ranks
    of a pipeline stage.

    These ranks are a grid [tensor, context, data] for attention, and a grid [data, ep,
    etp] for the experts.
    """
    moe = shape.moe
    if moe is None:
        _check_no_expert_sizes(shape, config)
        return
    if config.tp_size > 1 and not config.sequence_parallel:
        raise RunError(
            f"training.tp_size={config.tp_size} of a model with experts needs --sequence-parallel"
        )
    etp_choices = _sizes_of_experts(moe.intermediate_size, stage_ranks, config.ep_size)
    if config.etp_size not in etp_choices:
        raise RunError(
            f"training.etp_size={config.etp_size} must divide "
            f"moe_intermediate_size={moe.intermediate_size}, and training.ep_size x "
            f"training.etp_size the {stage_ranks} ranks of a pipeline stage; "
            f"choose {one_of(etp_choices)}"
        )
    ep_choices = _sizes_of_experts(moe.num_experts, stage_ranks, config.etp_size)
    if config.ep_size not in ep_choices:
        raise RunError(
            f"training.ep_size={config.ep_size} must divide num_experts={moe.num_experts}, and "
            f"training.ep_size x training.etp_size the {stage_ranks} ranks of a pipeline stage; "
            f"choose {one_of(ep_choices)}"
        )


def _check_no_expert_sizes(shape: ModelShape, config: TrainingConfig) -> None:
    if config.etp_size > 1:
        raise RunError(
            f"training.etp_size={config.etp_size} cuts experts, and a {shape.model_type} has none; "
            "choose 1"
        )
    if config.ep_size > 1:
        raise RunError(
            f"training.ep_size={config.ep_size} spreads experts, and a {shape.model_type} has "
            "none; choose 1"
        )


def _sizes_of_experts(whole: int, stage_ranks: int, other_size: int) -> list[int]:
    """The sizes that divide `whole` and, times `other_size`, the ranks of a stage; 1 is
    always allowed."""
    fitting = [n for n in divisors(whole) if stage_ranks % (n * other_size) == 0]
    return fitting or [1]


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def one_of(choices: Iterable[object]) -> str:
    """The choices as a message lists them: [1, 2, 4] -> "1, 2 or 4"."""
    *others, last = [str(choice) for choice in choices]
    if not others:
        return last
    return f"{', '.join(others)} or {last}"
