"""Fused paths are on exactly where the model and the machine have them."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from nanoslime.models.shape import ModelShape
from nanoslime.training.megatron.model import Kernels, fused_paths, kernels_for, model_config
from tests.models.hf import save_model
from tests.training.megatron.test_architectures import changes

pytestmark = pytest.mark.megatron

ALL = Kernels(**{field.name: True for field in fields(Kernels)})
NO_ROPE = {"apply_rope_fusion"}
NO_PERMUTE = {"moe_permute_fusion"}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    found = {}
    for family in ("qwen3", "qwen3_moe", "glm4_moe", "deepseek_v3"):
        directory = save_model(tmp_path_factory.mktemp("model"), family, **changes(family))
        found[family] = ModelShape.read(directory)
    return found


def off(shape, kernels):
    return {name for name, is_on in fused_paths(shape, kernels).items() if not is_on}


def test_each_model_has_the_paths_that_megatron_has_a_kernel_for(shapes):
    assert off(shapes["qwen3"], ALL) == NO_PERMUTE
    assert off(shapes["qwen3_moe"], ALL) == set()
    assert off(shapes["glm4_moe"], ALL) == set()
    assert off(shapes["deepseek_v3"], ALL) == NO_ROPE  # latent attention without YaRN


def test_each_path_needs_its_own_kernel(shapes):
    shape = shapes["qwen3_moe"]
    everything = set(fused_paths(shape, Kernels()))
    assert off(shape, Kernels()) == everything
    assert off(shape, Kernels(transformer_engine=True)) == everything - NO_ROPE - NO_PERMUTE
    assert off(shape, Kernels(compiler=True)) == everything - {"bias_activation_fusion"}
    own_gradients = Kernels(gradient_accumulation=True)
    assert off(shape, own_gradients) == everything - {"gradient_accumulation_fusion"}


def test_the_switches_are_megatrons_and_all_off_on_a_cpu(shapes):
    cpu = torch.device("cpu")
    assert kernels_for(cpu) == Kernels()
    settings = model_config(shapes["qwen3_moe"], torch.float32, cpu)
    names = {field.name for field in fields(TransformerConfig)}
    for name in fused_paths(shapes["qwen3_moe"], ALL):
        assert name in names
        assert getattr(settings, name) is False


def test_without_its_packages_a_gpu_has_no_kernels_of_transformer_engine():
    """This machine has none of them, whatever device is asked for."""
    found = kernels_for(torch.device("cuda"))
    assert not (found.transformer_engine or found.gradient_accumulation)
