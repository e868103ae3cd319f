"""Experts are chosen once: R2 in the pass for old logprobs, R3 in the engine."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from nanoslime.algorithms.grpo import GRPO
from nanoslime.batch import TrainBatch
from nanoslime.rollout.engines.embedded_model import EmbeddedEngine
from nanoslime.training.batching import BatchingOptions
from nanoslime.training.megatron.routing_replay import RouterReplay, routers, training_step
from nanoslime.types import GenerateRequest, Sample, SampleGroup, Status
from tests.models.hf import save_model
from tests.training import parity
from tests.training.batches import make_train_batches
from tests.training.megatron.test_architectures import changes
from tests.training.parity import (
    KL,
    RELATIVE,
    Job,
    Layout,
    copied,
    grad_shards,
    make_backend,
    train_batch,
    values_of,
)
from tests.training.reference import make_step

pytestmark = pytest.mark.megatron

RECOMPUTE = ("recompute", True)
SEQUENCE_PARALLEL = ("sequence_parallel", True)
NUM_MICROBATCHES = 4


def disturb(backend: Any, scale: float = 0.2) -> None:
    """Changes the routers, in the same way in every layout, so that they choose otherwise."""
    with torch.no_grad():
        for shard in backend.weight_shards():
            if shard.name.endswith("mlp.gate.weight"):
                generator = torch.Generator().manual_seed(len(shard.name))
                noise = torch.randn(shard.full_shape, generator=generator)
                shard.tensor.add_(scale * noise[shard.slices])


def replay(
    layout: Layout, model_dir: Any, rank: int, tmp: Any, step: dict[str, Any]
) -> dict[str, Any]:
    """Records, disturbs the routers, and makes a step of four micro-batches."""
    backend = make_backend(layout, model_dir, rank, tmp / "rendezvous", routing_replay="R2")
    batch = train_batch(step, backend.dp_rank, backend.dp_size)
    indices = list(range(len(batch.token_ids)))
    size = len(indices) // NUM_MICROBATCHES
    batch.microbatches = [indices[i : i + size] for i in range(0, len(indices), size)]
    backend.logprobs(batch, "policy")
    recorded = [experts.clone() for experts in batch.routed_experts or []]
    disturb(backend)
    metrics = backend.train_step(batch, GRPO(KL))
    return {"experts": recorded, "grads": copied(grad_shards(backend)), "step": metrics}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_model(
        tmp_path_factory.mktemp("model"), "qwen3_moe", num_experts=8, norm_topk_prob=True
    )


@pytest.fixture(scope="module")
def step(model_dir):
    return make_step(model_dir, 0)


@pytest.fixture
def start(model_dir, tmp_path):
    """Makes one-rank backends, one at a time; the process group ends with the test."""
    numbers = itertools.count()

    def make(directory=model_dir, **options):
        if dist.is_initialized():
            dist.destroy_process_group()
        rendezvous = tmp_path / f"rendezvous-{next(numbers)}"
        return make_backend(Layout(), directory, 0, rendezvous, **options)

    yield make
    if dist.is_initialized():
        dist.destroy_process_group()


def whole_grads(results: list[dict[str, Any]]) -> dict[str, Tensor]:
    return parity.assemble(shard for result in results for shard in result["grads"])


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference; tensors without a gradient are left out."""
    differences = []
    for name, grad in expected.items():
        if grad.any():
            differences.append(float((found[name] - grad).abs().max() / grad.abs().max()))
    return parity.largest(differences)


LAYOUTS = [
    Layout(options=(RECOMPUTE,)),
    Layout(pp_size=2),
    Layout(pp_size=2, options=(RECOMPUTE,)),
    Layout(pp_size=2, options=(("num_layers_in_last_pipeline_stage", 1),)),
    Layout(tp_size=2, options=(SEQUENCE_PARALLEL,)),
    Layout(tp_size=2, options=(SEQUENCE_PARALLEL, RECOMPUTE)),
    Layout(dp_size=2),
    Layout(tp_size=2, options=(SEQUENCE_PARALLEL, ("ep_size", 2))),
    Layout(cp_size=2),
    Layout(pp_size=2, vpp_size=2),
    Layout(pp_size=2, vpp_size=2, options=(RECOMPUTE,)),
]


def test_a_replayed_step_is_the_same_in_every_layout_and_with_recompute(model_dir, step, tmp_path):
    jobs = [Job(layout, model_dir, replay, step) for layout in [Layout(), *LAYOUTS]]
    alone, *others = parity.run(jobs, tmp_path)
    [expected] = alone
    expected_grads = whole_grads(alone)
    assert all((experts >= 0).all() for experts in expected["experts"])
    mismatch = values_of(expected["step"])["train/routing_mismatch_ratio"]
    assert 0.2 < mismatch < 0.9, "the disturbed routers choose otherwise, mostly or partly"
    for layout, results in zip(LAYOUTS, others, strict=True):
        found = difference(whole_grads(results), expected_grads)
        print(f"{layout}: gradients differ by {found:.1e}")
        assert found < RELATIVE, layout
        for result in results:
            assert result["step"].loss == pytest.approx(expected["step"].loss, rel=RELATIVE)
            found_mismatch = values_of(result["step"])["train/routing_mismatch_ratio"]
            assert found_mismatch == pytest.approx(mismatch, abs=1e-9)
        if layout.dp_size == 1:  # each rank has recorded its own layers and tokens
            by_rank = torch.stack([torch.cat(result["experts"]) for result in results])
            assert torch.equal(by_rank.amax(0), torch.cat(expected["experts"])), layout


def grads(backend: Any, batch: TrainBatch) -> dict[str, Tensor]:
    backend.train_step(batch, GRPO(KL))
    return parity.assemble(copied(grad_shards(backend)))


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "glm4_moe", "deepseek_v3"])
def test_replaying_the_routers_own_choice_changes_nothing(family, start, tmp_path):
    """Scores are softmax before or after the choice, or a biased sigmoid in groups.

    Some of their layers have no experts.
    """
    directory = save_model(tmp_path / "model", family, **changes(family))
    step = make_step(directory, 0)
    expected = grads(start(directory), train_batch(step))
    backend = start(directory, routing_replay="R2")
    batch = train_batch(step)
    backend.logprobs(batch, "policy")
    metrics = backend.train_step(batch, GRPO(KL))
    assert values_of(metrics)["train/routing_mismatch_ratio"] == 0
    assert difference(parity.assemble(copied(grad_shards(backend))), expected) == 0


def chosen(backend: Any, call: Callable[[], Any]) -> Tensor:
    """The experts that the forwards of `call` used: [tokens, layers, topk].

    Tokens are in the order of the micro-batches. The experts of a token are in
    ascending order.
    """
    maps: dict[int, list[Tensor]] = {}

    def keep(module: Any, _: Any, output: tuple[Tensor, Tensor]) -> None:
        _, routing_map = output
        maps.setdefault(module.layer_number, []).append(routing_map)

    hooks = []
    for module in backend._model_chunks[0].modules():
        if isinstance(module, TopKRouter):
            hooks.append(module.register_forward_hook(keep))
    call()
    for hook in hooks:
        hook.remove()
    by_layer = []
    for layer in sorted(maps):
        routing_map = torch.cat(maps[layer])
        by_layer.append(routing_map.nonzero()[:, 1].view(len(routing_map), -1))
    return torch.stack(by_layer, 1)


def test_the_recorded_experts_are_those_that_train_and_the_reference_has_its_own(start, step):
    backend = start(routing_replay="R2")
    batch = train_batch(step)
    free = chosen(backend, lambda: backend.logprobs(batch, "policy"))
    recorded = [batch.routed_experts[i] for indices in batch.microbatches for i in indices]
    assert torch.equal(torch.cat(recorded).long().sort(-1).values, free)
    disturb(backend)
    assert torch.equal(chosen(backend, lambda: backend.train_step(batch, GRPO(KL))), free)
    for router in routers(backend._model_chunks[0]):
        assert router.given is None
        assert not router.to_recompute
    by_reference = chosen(backend, lambda: backend.logprobs(batch, "ref"))
    assert torch.equal(by_reference, free), "by its own weights"
    disturb(backend)
    again = chosen(backend, lambda: backend.logprobs(batch, "policy"))
    assert not torch.equal(again, free), "recorded anew"


@pytest.mark.parametrize("replay", ["R2", "R3"])
def test_the_reference_chooses_for_itself_whatever_the_batch_holds(start, step, replay):
    """The experts in the batch are others: of disturbed routers, or the first two for all."""
    backend = start(routing_replay=replay)
    batch = train_batch(step)
    expected = backend.logprobs(batch, "ref")
    free = chosen(backend, lambda: backend.logprobs(batch, "ref"))
    if replay == "R2":
        disturb(backend)
        backend.logprobs(batch, "policy")
    else:
        first_two = torch.tensor([0, 1], dtype=torch.int16)
        batch.routed_experts = [first_two.repeat(len(ids), 4, 1) for ids in batch.token_ids]
    held, _ = packed_experts(batch)
    assert (held != free).any(-1).double().mean() > 0.2
    found = []
    by_reference = chosen(backend, lambda: found.extend(backend.logprobs(batch, "ref")))
    assert torch.equal(by_reference, free)
    assert all(map(torch.equal, found, expected))


def sampled(engine: Any) -> TrainBatch:
    """The batch that the loop makes of six samples of an engine."""
    groups = []
    for group_id, prompt in enumerate([[5, 6, 7], [9, 8, 7, 6, 5, 4]]):
        request = GenerateRequest(prompt, n=3, max_new_tokens=12, temperature=1.0)
        generations = asyncio.run(engine.generate(request))
        samples = [to_sample(group_id, prompt, generation) for generation in generations]
        groups.append(SampleGroup(group_id, samples))
    options = BatchingOptions(
        num_steps=1, dp_size=1, max_tokens=40, denominator="tokens", temperature=1.0
    )
    [[batch]] = make_train_batches(groups, options)
    batch.old_logprobs = batch.rollout_logprobs
    batch.ref_logprobs = batch.rollout_logprobs
    return batch


def to_sample(group_id: int, prompt: list[int], generation: Any) -> Sample:
    token_ids = [*prompt, *generation.token_ids]
    logprobs = [0.0] * len(prompt) + generation.logprobs
    return Sample(
        group_id=group_id,
        rollout_id=group_id * 100 + generation.token_ids[0],
        token_ids=np.array(token_ids, dtype=np.int32),
        loss_mask=np.arange(len(token_ids)) >= len(prompt),
        rollout_logprobs=np.array(logprobs, dtype=np.float32),
        policy_versions=[(len(prompt), 0)],
        status=Status.TRUNCATED,
        advantage=float(generation.token_ids[0] % 3 - 1),
        routed_experts=generation.routed_experts,
    )


def packed_experts(batch: TrainBatch) -> tuple[Tensor, Tensor]:
    """The engine's experts [tokens, layers, topk], and which tokens have some [tokens].

    Tokens are in the order of the micro-batches, experts sorted as by `chosen`.
    """
    in_order = [batch.routed_experts[i] for indices in batch.microbatches for i in indices]
    experts = torch.cat(in_order)
    is_known = (experts >= 0).flatten(1).all(-1)
    return experts.long().sort(-1).values, is_known


def logprob_gap(backend: Any, batch: TrainBatch) -> float:
    """The largest difference between the engine's logprobs and the trainer's."""
    gaps = []
    logprobs = backend.logprobs(batch, "policy")
    for trainer, engine, mask in zip(
        logprobs, batch.rollout_logprobs, batch.loss_mask, strict=True
    ):
        gaps.append(float((trainer - engine).abs()[mask].max()))
    return parity.largest(gaps)


def unrecorded(batch: TrainBatch) -> TrainBatch:
    """The batch with a list of its own for the experts that a pass fills in."""
    return replace(batch, routed_experts=list(batch.routed_experts))


def check_r3(start: Any, batch: TrainBatch) -> None:
    engine, is_known = packed_experts(batch)
    num_unknown = int((~is_known).sum())
    assert num_unknown == len(batch.token_ids), "only the last token of a sequence is unknown"
    free = start()
    own = chosen(free, lambda: free.logprobs(batch, "policy"))
    alike = torch.equal(own[is_known], engine[is_known])
    assert alike, "trainer and engine choose alike, entry by entry"
    disturb(free, scale=0.03)
    gap_of_free = logprob_gap(free, batch)
    disturbed = chosen(free, lambda: free.logprobs(batch, "policy"))

    backend = start(routing_replay="R3")
    gap = logprob_gap(backend, unrecorded(batch))
    disturb(backend, scale=0.03)
    gap_of_disturbed = logprob_gap(backend, unrecorded(batch))
    results = []
    held = chosen(backend, lambda: results.append(backend.train_step(batch, GRPO(KL))))
    assert torch.equal(held[is_known], engine[is_known])
    mismatch = values_of(results[0])["train/routing_mismatch_ratio"]
    free_mismatch = (disturbed[is_known] != engine[is_known]).any(-1).double().mean()
    print(
        f"logprob gap: {gap:.1e} with R3; disturbed routers: {gap_of_disturbed:.1e} with R3,"
        f" {gap_of_free:.1e} without; they choose otherwise in {mismatch:.1%}"
        f" (freely: {free_mismatch:.1%})"
    )
    assert gap < 1e-4
    assert mismatch > 0.02
    assert gap_of_disturbed < gap_of_free / 3


def test_r3_holds_the_engines_experts_whatever_the_routers_say(start, model_dir):
    engine = EmbeddedEngine(str(model_dir), "float32", "cpu", seed=0)
    check_r3(start, sampled(engine))


def test_a_batch_without_experts_is_refused(start, step):
    r3 = "routing_replay=R3: no routed experts; the samples hold none"
    with pytest.raises(ValueError, match=r3):
        start(routing_replay="R3").train_step(train_batch(step), GRPO(KL))


def test_a_step_that_fails_leaves_nothing_to_recompute():
    router = RouterReplay(0)
    with pytest.raises(ZeroDivisionError), training_step([router], {}):
        router.to_recompute.append(torch.zeros(1, 2))
        raise ZeroDivisionError
    assert not router.to_recompute


def test_routers_that_do_not_ask_are_refused(start):
    with pytest.raises(ValueError, match="excludes .*sinkhorn"):
        start(routing_replay="R2", megatron={"moe_router_load_balancing_type": "sinkhorn"})


def test_without_replay_the_engines_experts_are_ignored(start, step):
    batch = train_batch(step)
    zeros = [torch.zeros(len(ids), 4, 2, dtype=torch.int16) for ids in batch.token_ids]
    batch.routed_experts = zeros
    backend = start()
    free = chosen(backend, lambda: backend.logprobs(batch, "policy"))
    assert free.float().std() > 1
