"""Experts chosen once and replayed: R2 from the pass for old logprobs, R3 from the engine."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nanoslime.algorithms.grpo import GRPO
from nanoslime.batch import TrainBatch
from nanoslime.rollout.engines.embedded_model import EmbeddedEngine
from nanoslime.training.batching import plan
from nanoslime.training.megatron.routing_replay import RouterReplay, routers, training_step
from nanoslime.types import GenerateRequest, Sample, SampleGroup, Status
from tests.models.hf import save_model
from tests.training import parity
from tests.training.megatron.test_architectures import changes
from tests.training.parity import KL, RELATIVE, Layout, copied, make_backend, train_batch
from tests.training.reference import make_step

pytestmark = pytest.mark.megatron

RECOMPUTE, SEQUENCE_PARALLEL = ("recompute", True), ("sequence_parallel", True)


def disturb(backend: Any, scale: float = 0.2) -> None:
    """Other routers, so that they choose otherwise; the same in every layout."""
    with torch.no_grad():
        for shard in backend.weight_shards():
            if shard.name.endswith("mlp.gate.weight"):
                noise = torch.randn(
                    shard.full_shape, generator=torch.Generator().manual_seed(len(shard.name))
                )
                shard.tensor.add_(scale * noise[shard.slices])


def replay(
    layout: Layout, model_dir: Any, rank: int, tmp: Any, step: dict[str, Any]
) -> dict[str, Any]:
    """Records under the old weights, disturbs the routers, and makes a step of four micro-batches."""
    backend = make_backend(layout, model_dir, rank, tmp / "rendezvous", routing_replay="R2")
    batch = train_batch(step, backend.dp_rank, backend.dp_size)
    num = len(batch.token_ids)
    batch.microbatches = [[*range(i, i + num // 4)] for i in range(0, num, num // 4)]
    backend.logprobs(batch, "policy")
    recorded = [experts.clone() for experts in batch.routed_experts or []]
    disturb(backend)
    result = backend.train_step(batch, GRPO(KL))
    return {"experts": recorded, "grads": copied(backend.grad_shards()), "step": result}


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
    """Makes one-rank backends, one after the other; the process group ends with the test."""
    numbers = iter(range(9))

    def make(directory=model_dir, **options):
        if dist.is_initialized():
            dist.destroy_process_group()
        return make_backend(
            Layout(), directory, 0, tmp_path / f"rendezvous-{next(numbers)}", **options
        )

    yield make
    if dist.is_initialized():
        dist.destroy_process_group()


def whole_grads(results: list[dict[str, Any]]) -> dict[str, Tensor]:
    return parity.assemble(shard for result in results for shard in result["grads"])


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    pairs = [(found[name], g) for name, g in expected.items() if g.any()]
    return parity.largest(float((a - g).abs().max() / g.abs().max()) for a, g in pairs)


LAYOUTS = [
    Layout(options=(RECOMPUTE,)),
    Layout(pp_size=2),
    Layout(pp_size=2, options=(RECOMPUTE,)),
    Layout(tp_size=2, options=(SEQUENCE_PARALLEL,)),
    Layout(tp_size=2, options=(SEQUENCE_PARALLEL, RECOMPUTE)),
    Layout(dp_size=2),
    Layout(tp_size=2, options=(SEQUENCE_PARALLEL, ("ep_size", 2))),
    Layout(cp_size=2),
    Layout(pp_size=2, vpp_size=2),
    Layout(pp_size=2, vpp_size=2, options=(RECOMPUTE,)),
]


def test_a_replayed_step_is_the_same_in_every_layout_and_with_recompute(model_dir, step, tmp_path):
    jobs = [(layout, model_dir, replay, step) for layout in [Layout(), *LAYOUTS]]
    alone, *others = parity.run(jobs, tmp_path)
    expected, [recorded] = whole_grads(alone), [result["experts"] for result in alone]
    assert all((experts >= 0).all() for experts in recorded)
    ratio = alone[0]["step"].values["train/routing_mismatch_ratio"]
    assert 0.2 < ratio < 0.9, "the disturbed routers choose otherwise, mostly or partly"
    for layout, results in zip(LAYOUTS, others, strict=True):
        found = difference(whole_grads(results), expected)
        print(f"{layout}: gradients differ by {found:.1e}")
        assert found < RELATIVE, layout
        for result in results:
            assert result["step"].loss == pytest.approx(alone[0]["step"].loss, rel=RELATIVE)
            assert result["step"].values["train/routing_mismatch_ratio"] == pytest.approx(
                ratio, abs=1e-9
            )
        if layout.dp_size == 1:  # each rank has recorded its own layers and tokens
            parts = [torch.cat(result["experts"]) for result in results]
            assert torch.equal(torch.stack(parts).amax(0), torch.cat(recorded)), layout


def grads(backend: Any, batch: TrainBatch) -> dict[str, Tensor]:
    backend.train_step(batch, GRPO(KL))
    return parity.assemble(copied(backend.grad_shards()))


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "glm4_moe", "deepseek_v3"])
def test_replaying_the_routers_own_choice_changes_nothing(family, start, tmp_path):
    """Softmax before and after the choice, sigmoid with a bias, groups; layers without experts among them."""
    directory = save_model(tmp_path / "model", family, **changes(family))
    step = make_step(directory, 0)
    expected = grads(start(directory), train_batch(step))
    backend, batch = start(directory, routing_replay="R2"), train_batch(step)
    backend.logprobs(batch, "policy")
    found = backend.train_step(batch, GRPO(KL))
    assert found.values["train/routing_mismatch_ratio"] == 0
    assert difference(parity.assemble(copied(backend.grad_shards())), expected) == 0


def chosen(backend: Any, call: Any) -> Tensor:
    """Experts [tokens of all micro-batches, layers, topk], in ascending order, that the forwards of `call`
    used."""
    maps: dict[int, list[Tensor]] = {}

    def keep(module: Any, _: Any, output: tuple[Tensor, Tensor]) -> None:
        maps.setdefault(module.layer_number, []).append(output[1])

    modules = [m for m in backend._pieces[0].modules() if type(m).__name__ == "TopKRouter"]
    hooks = [module.register_forward_hook(keep) for module in modules]
    call()
    for hook in hooks:
        hook.remove()
    layers = [torch.cat(maps[layer]) for layer in sorted(maps)]
    return torch.stack([layer.nonzero()[:, 1].view(len(layer), -1) for layer in layers], 1)


def test_the_recorded_experts_are_those_that_train_and_the_reference_has_its_own(start, step):
    backend, batch = start(routing_replay="R2"), train_batch(step)
    free = chosen(backend, lambda: backend.logprobs(batch, "policy"))
    recorded = torch.cat([batch.routed_experts[i] for m in batch.microbatches for i in m]).long()
    assert torch.equal(recorded.sort(-1).values, free)
    disturb(backend)
    assert torch.equal(chosen(backend, lambda: backend.train_step(batch, GRPO(KL))), free)
    assert all(
        (router.given, len(router.to_recompute)) == (None, 0)
        for router in routers(backend._pieces[0])
    )
    assert torch.equal(chosen(backend, lambda: backend.logprobs(batch, "ref")), free), (
        "by its own weights"
    )
    disturb(backend)
    again = chosen(backend, lambda: backend.logprobs(batch, "policy"))
    assert not torch.equal(again, free), "recorded anew"


def sampled(engine: Any) -> TrainBatch:
    """What the loop makes of six samples of an engine."""
    groups = []
    for group_id, prompt in enumerate([[5, 6, 7], [9, 8, 7, 6, 5, 4]]):
        request = GenerateRequest(prompt, n=3, max_new_tokens=12, temperature=1.0)
        samples = [to_sample(group_id, prompt, g) for g in asyncio.run(engine.generate(request))]
        groups.append(SampleGroup(group_id, samples))
    sizes = dict(num_steps=1, dp_size=1, max_tokens=40)
    [[batch]] = plan(groups, **sizes, denominator="tokens", temperature=1.0)
    batch.ref_logprobs = batch.old_logprobs = batch.rollout_logprobs
    return batch


def to_sample(group_id, prompt, generation) -> Sample:
    num_prompt, num_tokens = len(prompt), len(prompt) + len(generation.token_ids)
    return Sample(
        group_id=group_id,
        rollout_id=group_id * 100 + generation.token_ids[0],
        token_ids=np.array([*prompt, *generation.token_ids], dtype=np.int32),
        loss_mask=np.arange(num_tokens) >= num_prompt,
        rollout_logprobs=np.array([0.0] * num_prompt + generation.logprobs, dtype=np.float32),
        policy_versions=[(num_prompt, 0)],
        status=Status.TRUNCATED,
        advantage=float(generation.token_ids[0] % 3 - 1),
        routed_experts=generation.routed_experts,
    )


def gap(batch: TrainBatch, logprobs: list[Tensor]) -> float:
    pairs = zip(logprobs, batch.rollout_logprobs, batch.loss_mask, strict=True)
    return float(torch.cat([(a - b).abs()[mask] for a, b, mask in pairs]).max())


def packed_experts(batch: TrainBatch) -> tuple[Tensor, Tensor]:
    """Those of the engine in the order of the micro-batches, sorted as by `chosen`; and where it has some."""
    experts = torch.cat(
        [batch.routed_experts[i] for indices in batch.microbatches for i in indices]
    )
    return experts.long().sort(-1).values, (experts >= 0).flatten(1).all(-1)


def logprob_gap(backend: Any, batch: TrainBatch) -> float:
    """Largest difference between the engine's logprobs and the trainer's; experts as the batch has them."""
    found = zip(
        backend.logprobs(batch, "policy"), batch.rollout_logprobs, batch.loss_mask, strict=True
    )
    return max(float((trainer - engine).abs()[mask].max()) for trainer, engine, mask in found)


def check_r3(start: Any, batch: TrainBatch) -> None:
    engine, known = packed_experts(batch)
    assert int((~known).sum()) == len(batch.token_ids), (
        "of each sequence only the last token is unknown"
    )
    free = start()
    own = chosen(free, lambda: free.logprobs(batch, "policy"))
    assert torch.equal(own[known], engine[known]), "trainer and engine choose alike, entry by entry"
    disturb(free, scale=0.03)
    gap_of_free = logprob_gap(free, batch)
    disturbed = chosen(free, lambda: free.logprobs(batch, "policy"))[known]

    backend = start(routing_replay="R3")
    gap = logprob_gap(backend, replace(batch, routed_experts=list(batch.routed_experts)))
    disturb(backend, scale=0.03)
    gap_of_disturbed = logprob_gap(
        backend, replace(batch, routed_experts=list(batch.routed_experts))
    )
    results = []
    held = chosen(backend, lambda: results.append(backend.train_step(batch, GRPO(KL))))
    assert torch.equal(held[known], engine[known])
    ratio = results[0].values["train/routing_mismatch_ratio"]
    others = (disturbed != engine[known]).any(-1).double().mean()
    print(
        f"logprob gap: {gap:.1e} with R3; disturbed routers: {gap_of_disturbed:.1e} with R3, ",
        end="",
    )
    print(f"{gap_of_free:.1e} without; they choose otherwise in {ratio:.1%} (freely: {others:.1%})")
    assert gap < 1e-4
    assert 0.02 < ratio and gap_of_disturbed < gap_of_free / 3


def test_r3_holds_the_engines_experts_whatever_the_routers_say(start, model_dir):
    engine = EmbeddedEngine(str(model_dir), "float32", "cpu", seed=0)
    check_r3(start, sampled(engine))


def test_a_batch_without_experts_is_refused(start, step):
    with pytest.raises(
        ValueError, match="routing_replay=R3: no routed experts; the samples hold none"
    ):
        start(routing_replay="R3").train_step(train_batch(step), GRPO(KL))
    with pytest.raises(
        ValueError, match="routing_replay=R2: no routed experts; logprobs were not computed"
    ):
        start(routing_replay="R2").train_step(train_batch(step), GRPO(KL))


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
    batch.routed_experts = [
        torch.zeros(len(ids), 4, 2, dtype=torch.int16) for ids in batch.token_ids
    ]
    backend = start()
    free = chosen(backend, lambda: backend.logprobs(batch, "policy"))
    assert free.float().std() > 1
