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


@dataclass(frozen=True, slots=True)
class PipelineSizes:
    """How the layers of a model are cut into pipeline stages.

    A rank has `vpp_size` chunks of the model, and chunk v of rank r is stage v * pp_size +
    r. Ranks whose number of layers is not given have equally many, or one more. These
    go to the middle of the pipeline, because the first rank also has the embedding and
    the last one the output layer; then to the first rank. Chunks of a rank, too, have
    equally many or one more, and the first and last stage rather fewer.
    """

    pp_size: int = 1
    vpp_size: int = 1
    # Layers of the first and of the last rank; None: to be found.
    first: int | None = None
    last: int | None = None

    @classmethod
    def of(cls, config: TrainingConfig) -> PipelineSizes:
        return cls(
            config.pp_size,
            config.vpp_size,
            config.num_layers_in_first_pipeline_stage,
            config.num_layers_in_last_pipeline_stage,
        )

    def layers_of_ranks(self, num_layers: int) -> list[int]:
        """[pp_size]: how many of the `num_layers` each rank has."""
        found: list[int | None] = [None] * self.pp_size
        found[-1] = self.last
        if self.first is not None:
            found[0] = self.first
        to_find = [rank for rank, layers in enumerate(found) if layers is None]
        last_rank = self.pp_size - 1
        to_find.sort(key=lambda rank: (rank in (0, last_rank), rank))
        rest = num_layers - sum(layers or 0 for layers in found)
        shares = dict(zip(to_find, _near_equal(rest, len(to_find)), strict=True))
        return [shares[rank] if layers is None else layers for rank, layers in enumerate(found)]

    def stages(self, num_layers: int) -> list[range]:
        """The layers of each stage, in the order of the model. check_pipeline comes before."""
        last_rank = self.pp_size - 1
        chunks_of_ranks = []
        for rank, layers in enumerate(self.layers_of_ranks(num_layers)):
            chunks = _near_equal(layers, self.vpp_size)
            if rank != last_rank:
                chunks.reverse()
            chunks_of_ranks.append(chunks)
        stages = []
        start = 0
        for chunk in range(self.vpp_size):
            for chunks in chunks_of_ranks:
                stages.append(range(start, start + chunks[chunk]))
                start += chunks[chunk]
        return stages


def _near_equal(whole: int, count: int) -> list[int]:
    """`count` numbers with the sum `whole`; the first ones may be larger by 1."""
    if not count:
        return []
    each, rest = divmod(whole, count)
    return [each + 1] * rest + [each] * (count - rest)


def check_pipeline(shape: ModelShape, config: TrainingConfig) -> None:
    """Raises RunError where the layers cannot be cut into the stages of `config`."""
    sizes = PipelineSizes.of(config)
    num_layers = shape.num_layers
    if sizes.pp_size == 1:
        _check_no_pipeline(sizes)
    num_stages = sizes.pp_size * sizes.vpp_size
    if num_stages > num_layers:
        raise RunError(
            f"training.pp_size={sizes.pp_size} x training.vpp_size={sizes.vpp_size} is more than "
            f"num_layers={num_layers}; choose sizes whose product is at most {num_layers}"
        )
    layers_of_ranks = sizes.layers_of_ranks(num_layers)
    if sum(layers_of_ranks) != num_layers or min(layers_of_ranks) < sizes.vpp_size:
        first, *_, last = PipelineSizes(sizes.pp_size, sizes.vpp_size).layers_of_ranks(num_layers)
        raise RunError(
            f"{_given_sizes(sizes)}: {num_layers} layers on {sizes.pp_size} ranks with "
            f"training.vpp_size={sizes.vpp_size} chunks or more layers each would be "
            f"{layers_of_ranks}; leave both out, which gives the first {first} and the last {last}"
        )


def _check_no_pipeline(sizes: PipelineSizes) -> None:
    if sizes.vpp_size > 1:
        raise RunError(
            f"training.vpp_size={sizes.vpp_size} needs training.pp_size of 2 or more; choose 1"
        )
    if sizes.first is not None or sizes.last is not None:
        raise RunError(f"{_given_sizes(sizes)} needs training.pp_size of 2 or more; leave it out")


def _given_sizes(sizes: PipelineSizes) -> str:
    """The given numbers of layers, each as a user sets it."""
    given = {"first": sizes.first, "last": sizes.last}
    texts = []
    for end, layers in given.items():
        if layers is not None:
            texts.append(f"training.num_layers_in_{end}_pipeline_stage={layers}")
    return " and ".join(texts)


def check_experts(shape: ModelShape, config: TrainingConfig, stage_ranks: int) -> None:
    """Raises RunError where the experts do not fit the sizes of `config` or the ranks
    of a pipeline stage.

    These ranks are a grid [tensor, context, data] for attention, and a grid [data, ep,
    etp] for the experts.
    """
    moe = shape.moe
    if moe is None:
        for name, verb in (("etp_size", "cuts"), ("ep_size", "spreads")):
            size = getattr(config, name)
            if size > 1:
                raise RunError(
                    f"training.{name}={size} {verb} experts, and a {shape.model_type} has none; "
                    "choose 1"
                )
        return
    if config.tp_size > 1 and not config.sequence_parallel:
        raise RunError(
            f"training.tp_size={config.tp_size} of a model with experts needs --sequence-parallel"
        )
    divided = {
        "etp_size": ("moe_intermediate_size", moe.intermediate_size, config.ep_size),
        "ep_size": ("num_experts", moe.num_experts, config.etp_size),
    }
    for name, (whole_name, whole, other_size) in divided.items():
        choices = _sizes_of_experts(whole, stage_ranks, other_size)
        if getattr(config, name) not in choices:
            raise RunError(
                f"training.{name}={getattr(config, name)} must divide {whole_name}={whole}, and "
                f"training.ep_size x training.etp_size the {stage_ranks} ranks of a pipeline "
                f"stage; choose {one_of(choices)}"
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
