"""A real SGLang server reports the experts of every token, and a Megatron trainer
replays them."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import torch.distributed as dist

from nanoslime.config import TrainingConfig
from nanoslime.models.shape import ModelShape
from nanoslime.processes.ports import free_port
from nanoslime.rollout.engines.sglang_client import SGLangEngine
from tests.models.hf import save_model
from tests.serving import make_server
from tests.training.megatron.test_routing_replay import check_r3, sampled
from tests.training.parity import Layout, make_backend

pytestmark = [pytest.mark.sglang, pytest.mark.megatron]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It has no dense layers: SGLang 0.5.23 expects experts in every layer of a Qwen3-MoE."""
    path = tmp_path_factory.mktemp("model")
    return save_model(path, "qwen3_moe", num_experts=8, norm_topk_prob=True)


@pytest.fixture(scope="module")
def engine(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangEngine]:
    log = tmp_path_factory.mktemp("sglang") / "engine.log"
    training = TrainingConfig(backend="megatron", routing_replay="R3")
    port = free_port("127.0.0.1")
    server = make_server(model_dir, log, port, training=training, skip_tokenizer_init=True)
    yield server.start(deadline_s=500)
    server.close()


def test_experts_are_sent_in_one_byte_each(engine: SGLangEngine, model_dir: Path) -> None:
    sampling = {"max_new_tokens": 6, "ignore_eos": True}
    body = {"input_ids": [5, 6, 7], "sampling_params": sampling, "return_routed_experts": True}
    options = {"headers": engine.authorization(), "timeout": 60}
    answer = requests.post(f"{engine.url}/generate", json=body, **options).json()
    shape = ModelShape.read(model_dir)
    num_ids = (3 + 6 - 1) * shape.num_layers * shape.moe.num_experts_per_token
    assert len(b64decode(answer["meta_info"]["routed_experts"])) == num_ids


def test_the_trainer_replays_what_sglang_chose(
    engine: SGLangEngine, model_dir: Path, tmp_path: Path
) -> None:
    """Also for prompts in the prefix cache: the second batch has the prompts of the
    first one."""
    started = 0

    def start(**options):
        nonlocal started
        started += 1
        if dist.is_initialized():
            dist.destroy_process_group()
        return make_backend(Layout(), model_dir, 0, tmp_path / f"rendezvous-{started}", **options)

    try:
        first = sampled(engine)
        cached = sampled(engine)
        num_reported = [len(experts) for experts in first.routed_experts]
        assert num_reported == [len(token_ids) for token_ids in first.token_ids]
        check_r3(start, cached)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
