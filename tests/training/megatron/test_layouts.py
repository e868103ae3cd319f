"""megatron-core loads in any grid of ranks what it wrote in another, as the weight map says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file, save_file

from nanoslime.models.rules import pieces
from nanoslime.models.shape import ModelShape
from tests.models.hf import save_model
from tests.training.megatron import gpt
from tests.training.megatron.gpt import LAYOUTS, Grid, differences, save
from tests.training.megatron.test_architectures import NOISE, TOKENS, changes
from tools.conversion.gpt_logits import logits

pytestmark = pytest.mark.megatron

TWO = [Grid(), Grid(tp=2), Grid(pp=2), Grid(ep=2), Grid(tp=2, ep=2, etp=1)]
FOUR = [Grid(tp=2, ep=2), Grid(pp=2, ep=2)]


@pytest.fixture(scope="module", params=["qwen2", "qwen2_moe", "qwen3_moe", "deepseek_v3"])
def model_dir(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    return save_model(directory, request.param, dtype=torch.bfloat16, **changes(request.param))


def fitting(model_dir, grids):
    """Those of the grids that the model fits into."""
    has_experts = ModelShape.read(model_dir).moe is not None
    return [grid for grid in grids if grid.ep == 1 or has_experts]


def test_any_grid_loads_what_another_saved(model_dir, two_ranks, four_ranks, tmp_path):
    path = tmp_path / "saved"
    four_ranks(save, model_dir, path, Grid(tp=2, pp=2), "B")
    for pool, grids in ((two_ranks, TWO), (four_ranks, FOUR)):
        for grid in fitting(model_dir, grids):
            assert not any(pool(differences, model_dir, path, grid)), grid


@pytest.mark.parametrize("layout", ["A", "C"])
def test_stacked_and_split_layouts_hold_the_same(model_dir, two_ranks, tmp_path, layout):
    path = tmp_path / layout
    grid = fitting(model_dir, TWO)[-1]
    two_ranks(save, model_dir, path, grid, layout)
    assert not any(two_ranks(differences, model_dir, path, Grid(tp=2), layout))


def test_megatron_core_names_its_tensors_as_the_weight_map_does(model_dir, two_ranks, tmp_path):
    two_ranks(save, model_dir, tmp_path / "saved", Grid(), "B")
    written = dist_checkpointing.load_tensors_metadata(str(tmp_path / "saved")).keys()
    expected = set()
    for piece in pieces(ModelShape.read(model_dir)):
        stacked = re.sub(r"(experts\.experts)\.\d+", r"\1", piece.megatron)
        expected.add(stacked)
    assert written == expected


def test_one_changed_bit_is_found_on_the_rank_that_holds_it(model_dir, two_ranks, tmp_path):
    two_ranks(save, model_dir, tmp_path / "saved", Grid(tp=2), "B")
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.3.self_attn.o_proj.weight"
    tensors[name].view(torch.int16)[0, -1] ^= 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    wrong = f"decoder.layers.3.self_attention.linear_proj.weight <- {name}"
    assert two_ranks(differences, other, tmp_path / "saved", Grid(tp=2)) == [[], [wrong]]
    assert two_ranks(differences, other, tmp_path / "saved", Grid(pp=2)) == [[], [wrong]]


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_ranks_compute_together_what_one_computes_alone(family, two_ranks, tmp_path):
    model_dir = save_model(tmp_path, family, **changes(family))
    expected = logits(ModelShape.read(model_dir), model_dir, TOKENS)
    for grid in (Grid(tp=2), Grid(ep=2), Grid(tp=2, ep=2, etp=1)):
        ranks = [
            torch.tensor(values)
            for values in two_ranks(gpt.logits, model_dir, grid, TOKENS.tolist())
        ]
        if grid.tp == 2:
            ranks = [torch.cat(ranks, dim=1)]
        for found in ranks:
            assert (found[:, :250] - expected).abs().max() < NOISE, grid


def test_the_logits_of_what_megatron_core_writes_are_those_of_the_files(tmp_path):
    model_dir = save_model(tmp_path / "model", "qwen3_moe")
    program = [sys.executable, "-W", "ignore", "-m", "tests.training.megatron.gpt"]
    subprocess.run([*program, model_dir, tmp_path, *LAYOUTS], check=True, timeout=240)
    shape = ModelShape.read(model_dir)
    expected = logits(shape, model_dir, TOKENS)
    for layout in LAYOUTS:
        assert torch.equal(logits(shape, tmp_path / layout, TOKENS), expected), layout
