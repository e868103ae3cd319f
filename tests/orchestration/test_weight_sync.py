"""After every sync the engine samples from exactly the weights that the trainer holds:
real SGLang, real trainers.

Two trainer ranks (Megatron TP=2, FSDP DP=2) take large steps and send their weights to
one running SGLang server. The engine's logprobs of what it samples and the trainer's of
the same tokens then agree to 1e-4.
"""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nanoslime.batch import TrainBatch
from nanoslime.config import GRPOConfig, ModelConfig, RolloutConfig, RunConfig, TrainingConfig
from nanoslime.config.rollout import WeightSyncConfig
from nanoslime.orchestration.worker import TrainWorker
from nanoslime.rollout.engines.sglang_client import SGLangEngine
from nanoslime.training.backend import RankEnv
from nanoslime.training.batching import BatchingOptions
from nanoslime.types import GenerateRequest, Sample, SampleGroup
from nanoslime.weight_sync.devices import SeparateDevices, SharedDevices
from nanoslime.weight_sync.engine_pool import EnginePool
from nanoslime.weight_sync.probe import Probe
from nanoslime.weight_sync.session import SyncSession
from tests.models.hf import save_model
from tests.serving import reference_logprobs
from tests.training.batches import make_train_batches
from tests.training.rank_pool import RankPool

pytestmark = [pytest.mark.sglang]
TEMPERATURE = 0.7


def run_config(backend: str) -> RunConfig:
    return RunConfig(
        model=ModelConfig(dtype="float32"),
        rollout=RolloutConfig(num_rollout=10, temperature=TEMPERATURE, rollout_batch_size=4),
        algorithm=GRPOConfig(),
        training=TrainingConfig(
            backend=backend, tp_size=2 if backend == "megatron" else 1, lr=5e-3
        ),
        # The embedding is larger than a bucket.
        weight_sync=WeightSyncConfig(bucket_bytes=40_000),
    )


def sample(engine: SGLangEngine, seed: int) -> list[SampleGroup]:
    """Four prompts, four samples each, with advantages that make every step move the
    weights.
    """
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 200, size=5 + i).tolist() for i in range(4)]
    requests = [
        GenerateRequest(token_ids=p, n=4, max_new_tokens=12, temperature=TEMPERATURE)
        for p in prompts
    ]

    async def ask() -> list:
        return await asyncio.gather(*(engine.generate(r) for r in requests))

    groups = []
    for group_id, (prompt, answers) in enumerate(zip(prompts, asyncio.run(ask()), strict=True)):
        samples = [
            Sample(
                group_id=group_id,
                rollout_id=4 * group_id + i,
                token_ids=np.array(prompt + a.token_ids, dtype=np.int32),
                loss_mask=np.arange(len(prompt) + len(a.token_ids)) >= len(prompt),
                rollout_logprobs=np.array([0.0] * len(prompt) + a.logprobs, dtype=np.float32),
                policy_versions=a.versions,
                status=a.status,
                reward=float(i),
                advantage=float(i) - 1.5,
            )
            for i, a in enumerate(answers)
        ]
        groups.append(SampleGroup(group_id, samples))
    return groups


def own_share(worker: TrainWorker, groups: list[SampleGroup]) -> TrainBatch:
    """This rank's part of the one optimizer step that the groups make."""
    options = BatchingOptions(
        num_steps=1,
        dp_size=worker.dp_size,
        max_tokens=64,
        denominator="tokens",
        temperature=TEMPERATURE,
    )
    [shards] = make_train_batches(groups, options)
    return shards[worker.dp_rank]


def gap(worker: TrainWorker, groups: list[SampleGroup]) -> float:
    """Largest |trainer's logprob - engine's| over this rank's share of the response tokens."""
    shard = own_share(worker, groups)
    logprobs = worker.backend.logprobs(shard, "policy")
    pairs = zip(logprobs, shard.rollout_logprobs, shard.loss_mask, strict=True)
    return float(torch.cat([(ours - theirs)[mask].abs() for ours, theirs, mask in pairs]).max())


def train_once(worker: TrainWorker, groups: list[SampleGroup]) -> None:
    worker.train([own_share(worker, groups)])


_worker: dict[str, TrainWorker] = {}  # of the rank's own process, between the calls of one test


def open_worker(env: RankEnv, backend: str, model: Path) -> None:
    _worker["it"] = TrainWorker(run_config(backend), model, env)


def step(env: RankEnv, groups: list[SampleGroup]) -> float:
    """One optimizer step; returns the gap on the same samples afterwards: what an engine
    with stale weights would show.
    """
    train_once(_worker["it"], groups)
    return gap(_worker["it"], groups)


def call_worker(env: RankEnv, method: str, *args: Any) -> Any:
    return getattr(_worker["it"], method)(*args)


def measure(env: RankEnv, groups: list[SampleGroup]) -> float:
    return gap(_worker["it"], groups)


def close_worker(env: RankEnv) -> None:
    _worker.pop("it").close()


class PoolRanks:
    """The workers of a pool's processes, as a session sees trainer ranks."""

    address = "127.0.0.1"

    def __init__(self, pool: RankPool):
        self._pool = pool
        self.sent: list[int] = []  # bytes by rank, of the last sync

    def call(self, method: str, *args: Any, what: str, deadline_s: float | None = None) -> Any:
        results = self._pool(call_worker, method, *args)
        if method == "send":
            self.sent = [sent.num_bytes for sent in results]
        return results


def open_session(
    pool: RankPool,
    engine: SGLangEngine,
    transport: str,
    directory: Path,
    ranks_by_engine: list[list[int]],
) -> tuple[SyncSession, PoolRanks, SharedDevices | SeparateDevices]:
    """The ranks share their devices with the engine where it has tensors by handle."""
    ranks = PoolRanks(pool)
    engines = EnginePool([engine])
    devices = SharedDevices(ranks, engines) if transport == "tensor" else SeparateDevices()
    session = SyncSession(
        ranks, engines, devices, transport=transport, directory=directory, deadline_s=120.0
    )
    session.open(ranks_by_engine)
    return session, ranks, devices


def num_flushes(engine: SGLangEngine) -> int:
    return Path(engine.log).read_text().count("Cache flushed successfully")


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.mark.megatron
def test_broadcast_from_megatron_tp2_after_every_step(ranks, sglang_engine, tiny_model, tmp_path):
    ranks(open_worker, "megatron", tiny_model)
    session, pool, _ = open_session(ranks, sglang_engine, "broadcast", tmp_path, [[0]])
    for version in (1, 2, 3):
        groups = sample(sglang_engine, seed=version)
        stale = max(ranks(step, groups))
        flushes = num_flushes(sglang_engine)
        session.sync(version)
        assert num_flushes(sglang_engine) == flushes + 1
        assert pool.sent[0] > 400_000 and pool.sent[1] == 0
        assert session.version == sglang_engine.policy_version() == version
        fresh = sample(sglang_engine, seed=10 + version)
        assert {v for g in fresh for s in g.samples for _, v in s.policy_versions} == {version}
        assert stale > 1e-2, "the step moved nothing: a stale engine would not be seen"
        assert max(ranks(measure, fresh)) < 1e-4
    ranks(close_worker)


@pytest.mark.megatron
def test_an_engine_that_comes_back_has_the_current_weights_before_a_router_sees_it(
    ranks, sglang_engine, tiny_model, other_model, tmp_path, monkeypatch
):
    """It came up with those of its checkpoint; it is in the group of the next sync, which is
    formed before the pause.
    """
    monkeypatch.setattr("nanoslime.weight_sync.engine_pool._PAUSE_S", 0.0)

    def restart() -> SGLangEngine:
        sglang_engine.update_weights_from_disk(str(other_model), 0)
        return sglang_engine

    ranks(open_worker, "megatron", tiny_model)
    pool = EnginePool([sglang_engine], [restart], max_restarts=1)
    session = SyncSession(
        PoolRanks(ranks),
        pool,
        SeparateDevices(),
        transport="broadcast",
        directory=tmp_path,
        deadline_s=120.0,
        probe=Probe(list(range(40, 72)), max_gap=0.01),
    )
    session.open([[0]])
    session.sync(1)
    told: list[tuple[int, float]] = []

    def on_change(engines: list[SGLangEngine]) -> None:
        for engine in engines:
            fresh = sample(engine, seed=40)
            told.append((engine.policy_version(), max(ranks(measure, fresh))))

    ranks(step, sample(sglang_engine, seed=39))
    session.sync(2)
    pool.subscribe(on_change, lambda: None)
    pool.lost("engine-0", "a test says that it hangs")
    deadline = time.monotonic() + 60
    while not pool.ready() and time.monotonic() < deadline:
        pool.service(session.join)
    ranks(step, sample(sglang_engine, seed=41))
    metrics = session.sync(3)
    assert [version for version, _ in told] == [2, 2, 3]
    assert all(gap < 1e-4 for _, gap in told)
    assert metrics["weight_sync/logprob_gap_max"] < 1e-4
    ranks(close_worker)


@pytest.mark.megatron
def test_disk_sync_from_megatron_tp2(ranks, sglang_engine, tiny_model, tmp_path):
    ranks(open_worker, "megatron", tiny_model)
    session, _, _ = open_session(ranks, sglang_engine, "disk", tmp_path, [[0]])
    assert max(ranks(step, sample(sglang_engine, seed=5))) > 1e-2
    flushes = num_flushes(sglang_engine)
    session.sync(7)
    assert num_flushes(sglang_engine) == flushes + 1
    assert sglang_engine.policy_version() == 7
    assert max(ranks(measure, sample(sglang_engine, seed=6))) < 1e-4
    ranks(close_worker)


def test_broadcast_from_fsdp_dp2(two_ranks, sglang_engine, tiny_model, tmp_path):
    two_ranks(open_worker, "fsdp", tiny_model)
    session, _, _ = open_session(two_ranks, sglang_engine, "broadcast", tmp_path, [[0]])
    assert max(two_ranks(step, sample(sglang_engine, seed=8))) > 1e-2
    session.sync(1)
    assert sglang_engine.policy_version() == 1
    assert max(two_ranks(measure, sample(sglang_engine, seed=9))) < 1e-4
    two_ranks(close_worker)


@pytest.mark.parametrize("backend", ["fsdp", pytest.param("megatron", marks=pytest.mark.megatron)])
def test_colocated_ranks_and_an_engine_take_turns(
    ranks, sglang_engine, tiny_model, tmp_path, backend
):
    """Tensors from the second rank, whose device the engine shares, in several buckets;
    two turns.
    """
    ranks(open_worker, backend, tiny_model)
    session, pool, devices = open_session(ranks, sglang_engine, "tensor", tmp_path, [[1]])
    for version in (1, 2):
        groups = sample(sglang_engine, seed=20 + version)
        if version == 1:
            sglang_engine.release_memory()  # as before the trainers are built
        else:
            devices.give_to_trainer()
        assert max(ranks(step, groups)) > 1e-2
        session.sync(version)
        assert min(pool.sent) > 400_000
        assert sglang_engine.policy_version() == version
    fresh = sample(sglang_engine, seed=30)
    devices.give_to_trainer()
    assert max(ranks(measure, fresh)) < 1e-4
    sglang_engine.resume_memory("weights")
    sglang_engine.resume_memory("cache")
    ranks(close_worker)


SCORING = [
    {"backend": "megatron", "tp_size": 2, "sequence_parallel": True},
    {"backend": "megatron", "pp_size": 2, "vpp_size": 2},
    {"backend": "megatron", "cp_size": 2},
    {"backend": "fsdp"},
]


def open_with(env: RankEnv, training: dict[str, Any], model: Path) -> None:
    config = replace(run_config("fsdp"), training=TrainingConfig(**training))
    _worker["it"] = TrainWorker(config, model, env)


@pytest.mark.megatron
@pytest.mark.parametrize("training", SCORING, ids=str)
def test_ranks_score_a_prompt_at_temperature_1_in_every_layout(ranks, tmp_path, training):
    """Those of the last pipeline stage do; what is sampled has another temperature."""
    sizes = {"num_hidden_layers": 4, "vocab_size": 320}
    model = save_model(tmp_path / "model", "qwen3", **sizes)
    tokens = list(range(40, 73))
    ranks(open_with, training, model)
    scored = [one for one in ranks(call_worker, "score", tokens) if one is not None]
    assert len(scored) == 2 // training.get("pp_size", 1)
    expected = reference_logprobs(model, tokens[:1], tokens[1:], 1.0)
    for logprobs in scored:
        assert (torch.tensor(logprobs) - expected).abs().max() < 1e-5
    ranks(close_worker)


def test_an_engine_with_another_model_is_not_silently_updated(
    two_ranks, sglang_engine, tiny_model, tmp_path
):
    """A checkpoint that lacks a tensor is refused by name, and the engine keeps its
    weights and version.
    """

    broken = tmp_path / "broken"
    broken.mkdir()
    tensors = load_file(tiny_model / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, broken / "model.safetensors")
    (broken / "config.json").write_text((tiny_model / "config.json").read_text())
    with pytest.raises(RuntimeError, match="model.layers.1.mlp.up_proj.weight"):
        sglang_engine.update_weights_from_disk(str(broken), 3)
    assert sglang_engine.policy_version() == 0
