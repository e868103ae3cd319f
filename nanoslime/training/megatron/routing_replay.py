"""Experts are chosen once, as TrainingConfig.routing_replay describes.

A forward takes the choice of an earlier pass (R2) or of the engine (R3), and so does
its recomputation in backward.

Only the choice is frozen. The weight of each chosen expert comes from the router's
present scores, so that gradients flow into the router.
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
    """The replay of one router, in the place of megatron-core's class of this name.

    megatron-core's class is one list per process. megatron-core 0.19.2 asks it for
    every choice of experts, whatever the score function, in groups or not.
    """

    def __init__(self, layer: int) -> None:
        self.layer = layer  # its number among the layers with experts
        # [tokens, topk] for the forward that runs; -1 is filled in with the router's
        # choice.
        self.given: Tensor | None = None
        # The experts of the forwards whose backward is to come, oldest first.
        self.to_recompute: deque[Tensor] = deque()
        # Over all replayed tokens: tokens whose experts the router would not have
        # chosen, and tokens.
        self.counts = torch.zeros(2).long()

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: Any,
        group_topk: Any,
        choose: Callable[..., Any],
    ) -> tuple[Tensor, Tensor]:
        """Scores and numbers of the experts, [tokens, topk] each."""
        own_scores, own_experts = choose(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if self.given is not None:
            is_known = self.given >= 0
            experts = torch.where(is_known, self.given.long(), own_experts)
            self._count(experts, own_experts, is_known)
            self.given.copy_(experts)
        elif self.to_recompute:
            experts = self.to_recompute.popleft().long()
        else:
            return own_scores, own_experts
        return scores.gather(1, experts), experts

    def _count(self, experts: Tensor, own_experts: Tensor, is_known: Tensor) -> None:
        sorted_experts = experts.sort(-1).values
        sorted_own = own_experts.sort(-1).values
        num_other = (sorted_experts != sorted_own).any(-1).sum()
        num_known = is_known.all(-1).sum()
        self.counts = self.counts.to(experts.device) + torch.stack([num_other, num_known])


def install_replay(model_chunks: Sequence[GPTModel], shape: ModelShape) -> None:
    """Gives each router a RouterReplay. Raises ValueError where a choice cannot be replayed."""
    for chunk in model_chunks:
        for router in _topk_routers(chunk):
            if router.config.moe_router_fusion or router.routing_type == "sinkhorn":
                raise ValueError(
                    "training.routing_replay excludes moe_router_fusion and sinkhorn routing"
                )
            layer = shape.moe_layers.index(router.layer_number - 1)
            router.router_replay = RouterReplay(layer)


def routers(model: GPTModel) -> list[RouterReplay]:
    """The replays that `install_replay` gave to the routers of this model chunk."""
    return [router.router_replay for router in _topk_routers(model) if router.router_replay]


@contextmanager
def replayed(routers: Sequence[RouterReplay], experts: Tensor) -> Iterator[None]:
    """Inside, one forward of a micro-batch takes `experts`, and fills in -1.

    experts is [tokens, num_moe_layers, topk]. With gradients, the recomputation of this
    forward takes them too, until `training_step` ends: schedules of a pipeline run the
    backwards of each model chunk in the order of its forwards.
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
    """Encloses the forwards and backwards of an optimizer step, on all ranks.

    Sets train/routing_mismatch_ratio: the share of replayed (token, layer) pairs for
    which a router would have chosen otherwise.
    """
    for router in routers:
        router.counts.zero_()
    try:
        yield
    finally:
        for router in routers:
            router.to_recompute.clear()  # none was taken where nothing is recomputed
    counts = torch.zeros(2).long()
    for router in routers:
        counts += router.counts.cpu()
    dist.all_reduce(counts)
    num_other, num_known = counts.tolist()
    if num_known:
        metrics["train/routing_mismatch_ratio"] = num_other / num_known


def _topk_routers(model: GPTModel) -> list[TopKRouter]:
    return [module for module in model.modules() if isinstance(module, TopKRouter)]
