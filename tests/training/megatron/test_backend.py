"""One Megatron rank in this process: what it refuses and skips, and mixed precision."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from safetensors.torch import load_file, save_file

from nanoslime.algorithms.grpo import GRPO
from nanoslime.config import GRPOConfig
from nanoslime.models.shape import ModelShape
from nanoslime.models.trainable import check_parallel
from nanoslime.storage.safetensors_file import METADATA_DIR
from nanoslime.training.megatron import weights
from nanoslime.training.megatron.model import transformer_config
from nanoslime.types import RunError
from tests.models.hf import save_model
from tests.training.parity import (
    KL,
    LENGTHS,
    Layout,
    assemble,
    copied,
    grad_shards,
    make_backend,
    train_batch,
)
from tests.training.reference import make_step

pytestmark = pytest.mark.megatron


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), "qwen3", max_shard_size="40KB")


@pytest.fixture(scope="module")
def steps(model_dir):
    return [make_step(model_dir, number) for number in range(2)]


@pytest.fixture
def start(model_dir, tmp_path):
    """Makes one-rank backends; the process group ends with the test."""
    yield lambda **changes: make_backend(Layout(), model_dir, 0, tmp_path / "rendezvous", **changes)
    if dist.is_initialized():
        dist.destroy_process_group()


def parameters(backend):
    return assemble(copied(backend.weight_shards()))


def with_dummies(batch):
    """Adds masked-out sequences in micro-batches of their own, as batching does."""
    dummy = {
        "token_ids": torch.zeros(2, dtype=torch.long),
        "loss_mask": torch.zeros(2, dtype=torch.bool),
        "rollout_logprobs": torch.zeros(2),
        "old_logprobs": torch.zeros(2),
        "ref_logprobs": torch.zeros(2),
        "advantages": 0.0,
        "token_weights": 0.0,
    }
    longer = {name: [*getattr(batch, name), value, value] for name, value in dummy.items()}
    first = len(batch.token_ids)
    last = first + 1
    return replace(batch, **longer, microbatches=[[first], *batch.microbatches, [last]])


def test_a_masked_out_micro_batch_changes_nothing(start, steps):
    backend = start()
    batch = train_batch(steps[0])
    with_dummy = with_dummies(batch)
    plain = backend.logprobs(batch, "policy")
    padded = backend.logprobs(with_dummy, "policy")
    assert all(torch.equal(a, b) for a, b in zip(plain, padded[:-2], strict=True))
    step = backend.train_step(with_dummy, GRPO(KL))
    dist.destroy_process_group()
    assert start().train_step(batch, GRPO(KL)).loss == pytest.approx(step.loss, rel=1e-6)


@pytest.mark.parametrize("distributed", [False, True])
def test_a_gradient_that_is_not_finite_skips_the_update(start, steps, distributed):
    backend = start(distributed_optimizer=distributed)
    batch = train_batch(steps[0])
    before = parameters(backend)
    broken = replace(batch, advantages=[math.nan] * len(LENGTHS))
    step = backend.train_step(broken, GRPO(KL))
    assert step.skipped
    assert math.isnan(step.grad_norm)
    assert all(torch.equal(value, before[name]) for name, value in parameters(backend).items())
    good = backend.train_step(batch, GRPO(KL))
    assert not good.skipped
    assert good.lr < step.lr, "a skipped step still counts in the schedule"
    assert not torch.equal(parameters(backend)["model.norm.weight"], before["model.norm.weight"])


def test_without_clipping_the_update_uses_the_whole_gradient(start, steps):
    backend = start(clip_grad=0.0)
    step = backend.train_step(train_batch(steps[0]), GRPO(KL))
    grads = assemble(copied(grad_shards(backend)))
    squares = sum(float(grad.square().sum()) for grad in grads.values())
    assert math.sqrt(squares) == pytest.approx(step.grad_norm, rel=1e-4)


def test_bfloat16_trains_near_float32_and_sends_bfloat16(model_dir, steps, tmp_path, start):
    exact = start().train_step(train_batch(steps[0]), GRPO(KL))
    dist.destroy_process_group()
    backend = make_backend(Layout(dtype="bfloat16"), model_dir, 0, tmp_path / "rendezvous-2")
    step = backend.train_step(train_batch(steps[0]), GRPO(KL))
    assert step.loss == pytest.approx(exact.loss, abs=0.05)
    assert step.grad_norm == pytest.approx(exact.grad_norm, rel=0.1)
    assert {s.tensor.dtype for s in backend.weight_shards()} == {torch.bfloat16}


@pytest.mark.parametrize("distributed", [False, True])
def test_a_bfloat16_run_resumes_from_its_float32_main_parameters(
    model_dir, steps, tmp_path, start, distributed
):
    batches = [train_batch(step) for step in steps]
    path = tmp_path / "saved"
    layout = Layout(dtype="bfloat16", options=(("distributed_optimizer", distributed),))
    first = make_backend(layout, model_dir, 0, tmp_path / "rendezvous")
    first.train_step(batches[0], GRPO(KL))
    path.mkdir()
    first.save(path)
    expected = [first.train_step(batch, GRPO(KL)) for batch in batches]
    dist.destroy_process_group()
    second = make_backend(layout, model_dir, 0, tmp_path / "rendezvous-2")
    second.load(path)
    assert [second.train_step(batch, GRPO(KL)) for batch in batches] == expected
    after = parameters(second)
    assert all(torch.equal(after[name], value) for name, value in parameters(first).items())


def test_reference_logprobs_need_a_configured_reference(model_dir, steps, tmp_path, start):
    class Plain(Layout):
        def config(self, **changes):
            return replace(super().config(**changes), algorithm=GRPOConfig())

    backend = make_backend(Plain(), model_dir, 0, tmp_path / "rendezvous")
    with pytest.raises(AssertionError, match="whose weights were not kept"):
        backend.logprobs(train_batch(steps[0]), "ref")


def test_a_damaged_or_foreign_megatron_checkpoint_is_named(start, steps, tmp_path):
    backend = start()
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(RunError, match="empty cannot be loaded"):
        backend.load(empty)
    path = tmp_path / "saved"
    path.mkdir()
    backend.save(path)
    for file in path.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(RunError, match="saved cannot be loaded"):
        backend.load(path)


def test_a_checkpoint_has_what_its_conversion_to_hugging_face_needs(model_dir, start, tmp_path):
    """The model's configuration, beside Megatron's own files."""
    (tmp_path / "saved").mkdir()
    start().save(tmp_path / "saved")
    metadata = tmp_path / "saved" / METADATA_DIR
    assert (metadata / "config.json").read_text() == (model_dir / "config.json").read_text()
    assert not list(metadata.glob("*.safetensors*"))


def test_a_checkpoint_has_the_files_of_the_pinned_release(start, tmp_path):
    """Since 0.19 the common state is an object among the tensors, without a backend."""
    path = tmp_path / "saved"
    path.mkdir()
    start().save(path)
    assert not (path / "common.pt").exists()
    metadata = json.loads((path / "metadata.json").read_text())
    assert metadata == {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    common = dist_checkpointing.load_common_state_dict(str(path))
    assert common["step_history"]["optimizer_step"] == 0


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        (
            {"tp_size": 2, "cp_size": 2},
            6,
            "tp_size=2 x training.cp_size=2 x training.pp_size=1 = 4 does not divide the 6"
            " trainer ranks",
        ),
        (
            {"pp_size": 2, "vpp_size": 4},
            2,
            "vpp_size=4 is more than num_layers=4; choose sizes whose product is at most 4",
        ),
        ({"ep_size": 2}, 2, "training.ep_size=2 spreads experts, and a qwen3 has none"),
        ({"tp_size": 4}, 4, "tp_size=4 does not divide num_key_value_heads=2"),
        ({"pp_size": 5}, 5, "num_layers=4; choose sizes whose product is at most 4"),
        ({"tp_size": 2, "pp_size": 2}, 6, "training.pp_size=2 = 4 does not divide the 6 trainer"),
    ],
)
def test_impossible_layouts_are_refused(model_dir, changes, world_size, message):
    shape = ModelShape.read(model_dir)
    with pytest.raises(RunError, match=message):
        check_parallel(Layout().config(**changes).training, shape, world_size, slots=world_size)


def test_megatron_fields_are_passed_through_and_unknown_ones_refused(model_dir):
    shape = ModelShape.read(model_dir)
    cpu = torch.device("cpu")
    config = transformer_config(shape, Layout().config(megatron={"attention_dropout": 0.5}), cpu)
    assert config.attention_dropout == 0.5
    misspelt = Layout().config(megatron={"atention_dropout": 0.5})
    unknown = r"megatron-core's TransformerConfig has no field \['atention_dropout'\]"
    with pytest.raises(ValueError, match=unknown):
        transformer_config(shape, misspelt, cpu)


def shard_with(directory, name):
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    return directory / index[name]


def rewrite(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def drop_from_index(directory, name):
    index_file = directory / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    del index["weight_map"][name]
    index_file.write_text(json.dumps(index))


NORM = "model.norm.weight"


def missing_shard(directory):
    shard_with(directory, NORM).unlink()


def truncated_shard(directory):
    file = shard_with(directory, NORM)
    file.write_bytes(file.read_bytes()[:-10])


def missing_tensor(directory):
    rewrite(shard_with(directory, NORM), lambda tensors: tensors.pop(NORM))
    drop_from_index(directory, NORM)


def misshapen_tensor(directory):
    rewrite(shard_with(directory, NORM), lambda tensors: tensors.update({NORM: torch.ones(31)}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing_shard, r"model-.*\.safetensors is missing"),
        (truncated_shard, r"model-.*\.safetensors is truncated"),
        (missing_tensor, "has no tensor model.norm.weight"),
        (misshapen_tensor, r"model.norm.weight is \[31\], config.json asks for \[32\]"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(start, tmp_path, damage, message):
    directory = save_model(tmp_path / "damaged", "qwen3", max_shard_size="40KB")
    backend = start()
    damage(directory)
    with pytest.raises((ValueError, RunError), match=message):
        weights.load(backend._parameter_pieces, backend._shape, directory)


def add_equal_head(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def test_a_tied_checkpoint_whose_head_differs_is_refused(start, tmp_path):
    directory = save_model(tmp_path / "model", "qwen3")
    backend = start()
    file = directory / "model.safetensors"
    rewrite(file, add_equal_head)
    weights.load(backend._parameter_pieces, backend._shape, directory)
    rewrite(file, lambda tensors: tensors["lm_head.weight"].mul_(1.01))
    message = "lm_head.weight has to repeat model.embed_tokens.weight, but differs"
    with pytest.raises(RunError, match=message):
        weights.load(backend._parameter_pieces, backend._shape, directory)
