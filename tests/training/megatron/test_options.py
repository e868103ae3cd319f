"""Options of megatron-core's data parallelism and optimizer reach the real objects."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from nanoslime.algorithms.grpo import GRPO
from nanoslime.config import RunConfig, TrainingConfig
from nanoslime.training.megatron.optimizer import optimizer_config
from tests.models.hf import save_model
from tests.training.parity import KL, Layout, make_backend, train_batch
from tests.training.reference import make_step

pytestmark = pytest.mark.megatron

OVERLAP = {"overlap_grad_reduce": True, "bucket_size": 1000}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.fixture
def start(model_dir, tmp_path):
    yield lambda **changes: make_backend(Layout(), model_dir, 0, tmp_path / "rendezvous", **changes)
    if dist.is_initialized():
        dist.destroy_process_group()


def num_buckets(backend):
    return [len(buffer.buckets) for chunk in backend._distributed for buffer in chunk.buffers]


def test_the_size_of_buckets_and_the_type_of_gradients_are_those_asked_for(start):
    [plain] = num_buckets(start())
    dist.destroy_process_group()
    backend = start(megatron_ddp=OVERLAP, distributed_optimizer=True)
    [chunk] = backend._distributed
    assert plain == 1
    assert num_buckets(backend)[0] > 5
    assert chunk.ddp_config.bucket_size == 1000
    assert chunk.ddp_config.use_distributed_optimizer
    assert chunk.ddp_config.grad_reduce_in_fp32
    assert chunk.config.no_sync_func is not None


def test_gradients_are_reduced_in_the_last_micro_batch_however_many_there_are(start, model_dir):
    steps = [make_step(model_dir, number) for number in range(3)]
    norms = []
    for options in ({}, {"megatron_ddp": OVERLAP, "distributed_optimizer": True}):
        backend = start(**options)
        norms.append([])
        for step, sequences in zip(steps, (1, 8, 2), strict=True):
            batch = train_batch(step, sequences=sequences)
            norms[-1].append(backend.train_step(batch, GRPO(KL)).grad_norm)
        dist.destroy_process_group()
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)


def test_options_of_the_optimizer_reach_it_and_types_are_read_from_their_names():
    training = TrainingConfig(
        optimizer_offload=True,
        megatron_optimizer={
            "exp_avg_dtype": "bfloat16",
            "main_params_dtype": "float32",
            "use_precision_aware_optimizer": True,
            "optimizer_offload_fraction": 0.5,
        },
    )
    settings = optimizer_config(RunConfig(training=training))
    assert settings.exp_avg_dtype is torch.bfloat16
    assert settings.main_params_dtype is torch.float32
    assert settings.optimizer_offload_fraction == 0.5
    assert settings.use_distributed_optimizer


def test_an_optimizer_decays_the_norms_of_queries_where_asked(start):
    def decayed(backend):
        groups = backend._optimizer.param_groups
        return sum(len(group["params"]) for group in groups if group["wd_mult"])

    plain = decayed(start())
    dist.destroy_process_group()
    asked = decayed(start(megatron_optimizer={"apply_wd_to_qk_layernorm": True}))
    assert asked == plain + 8  # the norms of queries and keys in 4 layers


def test_a_type_that_torch_does_not_have_is_refused():
    training = TrainingConfig(megatron_optimizer={"exp_avg_dtype": "bf16"})
    with pytest.raises(ValueError, match="exp_avg_dtype='bf16' is no type of torch; choose"):
        optimizer_config(RunConfig(training=training))
