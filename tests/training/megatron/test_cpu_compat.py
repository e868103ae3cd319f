"""Each thing that megatron-core expects of CUDA and gets from the CPU; torch is unchanged."""

import sys

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.optimizer import clip_grads
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer import transformer_layer
from megatron.core.transformer.moe import token_dispatcher

from nanoslime.training.megatron import cpu_compat

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.skipif(torch.cuda.is_available(), reason="does nothing where CUDA is available"),
]


@pytest.fixture(autouse=True)
def installed():
    cpu_compat.install()


def test_every_loaded_megatron_module_sees_the_stand_in():
    modules = [
        m
        for name, m in sys.modules.items()
        if name.startswith("megatron.core") and hasattr(m, "torch")
    ]
    assert len(modules) > 50
    assert not [m.__name__ for m in modules if m.torch is torch]


def test_the_modules_that_a_save_loads_see_the_stand_in():
    for module in cpu_compat.LOADED_BY_A_SAVE:
        assert module.torch is cpu_compat._TORCH, module.__name__


def test_a_module_loaded_later_is_reached_by_installing_again(monkeypatch):
    monkeypatch.setattr(mappings, "torch", torch)
    cpu_compat.install()
    assert mappings.torch is cpu_compat._TORCH


def test_torch_itself_is_untouched():
    assert sys.modules["torch"] is torch and torch is not cpu_compat._TORCH
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
    assert torch.zeros(1).type() == "torch.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1).cuda()


def test_the_current_device_is_the_cpu():
    assert mappings.torch.cuda.current_device() == torch.device("cpu")
    assert mappings.torch.empty(2, device=mappings.torch.cuda.current_device()).device.type == "cpu"


@pytest.mark.parametrize("factory", ["zeros", "ones", "empty"])
def test_factories_take_a_literal_cuda_device(factory):
    assert getattr(clip_grads.torch, factory)(2, device="cuda").device.type == "cpu"


def test_tensor_full_and_arange_take_a_literal_cuda_device():
    seen = clip_grads.torch
    made = [
        seen.tensor([1.0], device="cuda"),
        seen.full((1,), 2.0, device="cuda"),
        seen.arange(2, device="cuda:0"),
    ]
    assert all(t.device.type == "cpu" for t in made)


def test_streams_and_events_do_nothing():
    cuda = transformer_layer.torch.cuda
    stream, event = cuda.Stream(), cuda.Event()
    stream.wait_stream(cuda.current_stream())
    stream.wait_event(event)
    event.record(stream)
    event.synchronize()
    cuda.synchronize()
    with cuda.stream(stream):
        pass


def test_everything_else_of_cuda_is_the_real_one():
    assert transformer_layer.torch.cuda.is_available is torch.cuda.is_available
    assert transformer_layer.torch.nn is torch.nn


def test_the_random_state_tracker_forks_the_cpu_generator():
    tracker = tensor_parallel.get_cuda_rng_tracker()
    tracker.reset()
    tracker.add("probe", 7)
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with tracker.fork("probe"):
        forked = torch.rand(3)
    assert torch.equal(torch.rand(2), expected), "fork must leave the default state as it was"
    assert torch.equal(forked, torch.rand(3, generator=torch.Generator().manual_seed(7)))
    with tracker.fork("probe"):
        assert not torch.equal(torch.rand(3), forked), "a second fork goes on where the first ended"
    tracker.reset()


def test_counts_of_tokens_on_the_cpu_become_the_arrays_that_experts_split_by():
    counts = token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([2, 3]), as_numpy=True)
    assert counts.tolist() == [2, 3] and not torch.is_tensor(counts)
    assert torch.is_tensor(token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([2])))


def test_inside_cuda_names_tensors_say_cuda_and_stay_where_they_are():
    with cpu_compat.cuda_names():
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
        assert torch.zeros(1).cuda().device.type == "cpu"
        assert torch.zeros(1).type(torch.float64).dtype == torch.float64
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_with_cuda_nothing_is_changed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mappings, "torch", torch)
    cpu_compat.install()
    assert mappings.torch is torch
    with cpu_compat.cuda_names():
        assert torch.zeros(1).type() == "torch.FloatTensor"
