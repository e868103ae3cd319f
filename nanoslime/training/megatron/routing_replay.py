"""Experts are chosen once: a forward takes those of an earlier pass (R2) or of the engine (R3), and so does
its recomputation in backward. See TrainingConfig.routing_replay.

Only the choice is frozen. What each chosen expert weighs comes from the router's scores as they are now, so
that gradients flow into the router.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from nanoslime.models.shape import ModelShape


class RouterReplay:
    """One router's, in the place of megatron-core's class of this name, which is one list per process.

    megatron-core 0.16.1 asks it for every choice of experts, whatever the score function, in groups or not.
    """

    def __init__(self, layer: int) -> None:
        self.layer = layer  # its number among those with experts
        self.given: Tensor | None = (
            None  # [tokens, topk] for the forward that runs; -1: to be filled in
        )
        self.to_recompute: deque[Tensor] = (
            deque()
        )  # of forwards whose backward is to come, oldest first
        self.counts = torch.zeros(
            2
        ).long()  # tokens whose experts the router would not have chosen; tokens

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: Any,
        group_topk: Any,
        choose: Callable[..., Any],
    ) -> tuple[Tensor, Tensor]:
        """Scores and numbers of the experts, [tokens, topk] each."""
        values, own = choose(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if self.given is not None:
            given, known = self.given, self.given >= 0
            experts = torch.where(known, given.long(), own)
            other = (experts.sort(-1).values != own.sort(-1).values).any(-1)
            self.counts = self.counts.to(own.device) + torch.stack(
                [other.sum(), known.all(-1).sum()]
            )
            given.copy_(experts)
        elif self.to_recompute:
            experts = self.to_recompute.popleft().long()
        else:
            return values, own
        return scores.gather(1, experts), experts


def install_replay(pieces: Sequence[GPTModel], shape: ModelShape) -> None:
    """Gives each router a RouterReplay. Raises ValueError where a choice cannot be replayed."""
    for router in (m for piece in pieces for m in piece.modules() if isinstance(m, TopKRouter)):
        if router.config.moe_router_fusion or router.routing_type == "sinkhorn":
            raise ValueError(
                "training.routing_replay excludes moe_router_fusion and sinkhorn routing"
            )
        router.router_replay = RouterReplay(shape.moe_layers.index(router.layer_number - 1))


def routers(piece: GPTModel) -> list[RouterReplay]:
    """What `install_replay` put there, if it did."""
    return [
        m.router_replay for m in piece.modules() if isinstance(m, TopKRouter) and m.router_replay
    ]


@contextmanager
def replayed(routers: Sequence[RouterReplay], experts: Tensor) -> Iterator[None]:
    """Inside, one forward of a micro-batch takes `experts` [tokens, num_moe_layers, topk], and fills in -1.

    With gradients, so does its recomputation, until `training_step` ends: schedules of a pipeline run the
    backwards of each piece of the model in the order of its forwards.
    """
    for router in routers:
        router.given = experts[:, router.layer]
        if torch.is_grad_enabled():
            router.to_recompute.append(router.given)
    try:
        yield
    finally:
        for router in routers:
            router.given = None


@contextmanager
def training_step(routers: Sequence[RouterReplay], metrics: dict[str, float]) -> Iterator[None]:
    """Round the forwards and backwards of an optimizer step, on all ranks. Sets train/routing_mismatch_ratio:
    the share of replayed (token, layer) pairs for which a router would have chosen otherwise."""
    for router in routers:
        router.counts.zero_()
    try:
        yield
    finally:
        for router in routers:
            router.to_recompute.clear()  # none was taken where nothing is recomputed
    counts = sum((router.counts.cpu() for router in routers), torch.zeros(2).long())
    dist.all_reduce(counts)
    if counts[1]:
        metrics["train/routing_mismatch_ratio"] = float(counts[0] / counts[1])
