"""Conversions beside the real megatron-core: it loads what is written here, and is read itself."""

import itertools

import pytest
import torch
from safetensors.torch import save_file

from nanoslime.models.shape import ModelShape
from nanoslime.training.megatron.backend import MegatronBackend
from tests.models.hf import save_model
from tests.tools.checkpoints import (
    TOKENIZER,
    load,
    make,
    same,
    to_huggingface,
    to_megatron,
    turn_into_old_form,
)
from tests.training.megatron.gpt import Grid, differences, save
from tests.training.megatron.test_architectures import changes
from tests.training.parity import Layout
from tools.conversion import torch_dist
from tools.conversion.checkpoint import LATEST
from tools.verify_checkpoint import main as verify

pytestmark = pytest.mark.megatron
GRIDS = {2: [Grid(), Grid(tp=2), Grid(pp=2)], 4: [Grid(tp=2, pp=2)]}
EXPERT_GRIDS = {2: [*GRIDS[2], Grid(ep=2)], 4: [*GRIDS[4], Grid(tp=2, ep=2)]}


@pytest.fixture
def pools(two_ranks, four_ranks):
    return {2: two_ranks, 4: four_ranks}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe", "glm4_moe", "deepseek_v3"])
def test_megatron_core_loads_what_is_converted_in_any_grid(family, pools, tmp_path):
    model = make(tmp_path / "model", family, bf16=True)
    assert to_megatron(model, tmp_path / "megatron") == 0
    grids_by_size = EXPERT_GRIDS if ModelShape.read(model).moe else GRIDS
    for size, grids in grids_by_size.items():
        for grid in grids:
            by_rank = pools[size](differences, model, tmp_path / "megatron" / "release", grid)
            assert not any(by_rank), grid


def test_a_wrong_byte_would_be_seen(two_ranks, tmp_path):
    model = make(tmp_path / "model", "qwen3")
    assert to_megatron(model, tmp_path / "megatron") == 0
    stored = torch_dist.read(tmp_path / "megatron" / "release").tensors
    chunk = stored["decoder.layers.2.mlp.linear_fc2.weight"].chunks[0]
    with open(chunk.file, "r+b") as file:
        file.seek(chunk.offset)
        file.write(b"\x55")
    wrong, _ = two_ranks(differences, model, tmp_path / "megatron" / "release", Grid(tp=2))
    assert wrong == [
        "decoder.layers.2.mlp.linear_fc2.weight <- model.layers.2.mlp.down_proj.weight"
    ]


@pytest.mark.parametrize("layout", ["A", "B", "C"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "deepseek_v3"])
def test_what_megatron_core_writes_converts_to_the_original_files(family, layout, pools, tmp_path):
    model = make(tmp_path / "model", family, bf16=True, shards=True)
    grid = Grid(tp=2, pp=2)
    if layout == "C" and family == "qwen3_moe":
        grid = Grid(tp=2, ep=2)
    # The directory as Megatron-LM and slime have it.
    iteration = tmp_path / "run" / "iter_0000012"
    iteration.parent.mkdir()
    pools[4](save, model, iteration, grid, layout)
    (tmp_path / "run" / LATEST).write_text("12\n")
    assert to_huggingface(tmp_path / "run", tmp_path / "back", "--hf-checkpoint", model) == 0
    weights = sorted(path.name for path in model.glob("model*"))
    assert len(weights) > 2
    for name in weights:
        assert (model / name).read_bytes() == (tmp_path / "back" / name).read_bytes(), name
    assert verify([str(tmp_path / "run"), str(model), "--hf-checkpoint", str(model)]) == 0
    turn_into_old_form(iteration)
    assert verify([str(tmp_path / "run"), str(model), "--hf-checkpoint", str(model)]) == 0


def _save_step(env, model, directory, layout):
    backend = MegatronBackend(layout.config(distributed_optimizer=True), model, env)
    if env.rank == 0:
        directory.mkdir(parents=True)
    torch.distributed.barrier()
    backend.save(directory)
    torch.distributed.barrier()
    found = []
    for shard in backend.weight_shards():
        found.append((shard.name, shard.full_shape, shard.slices, shard.tensor.clone()))
    return found


@pytest.mark.parametrize("layout", [Layout(tp_size=2), Layout(pp_size=2), Layout()], ids=str)
def test_a_step_of_a_run_converts_without_being_told_the_model(layout, two_ranks, tmp_path):
    model = make(tmp_path / "model", "qwen3")
    step = tmp_path / "checkpoints" / "step_3"
    shards_by_rank = two_ranks(_save_step, model, step / "trainer", layout)
    expected: dict[str, torch.Tensor] = {}
    for name, shape, slices, tensor in itertools.chain(*shards_by_rank):
        expected.setdefault(name, torch.full(shape, torch.nan))[slices] = tensor
    assert to_huggingface(step, tmp_path / "back") == 0
    assert same(load(tmp_path / "back"), expected)
    tokenizer = (tmp_path / "back" / TOKENIZER).read_bytes()
    assert tokenizer == (model / TOKENIZER).read_bytes()


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "deepseek_v3"])
def test_logits_are_compared_with_the_real_gpt_model(family, tmp_path, capsys):
    model = save_model(tmp_path / "model", family, **changes(family))
    assert to_megatron(model, tmp_path / "megatron") == 0
    assert verify([str(model), str(tmp_path / "megatron"), "--logits"]) == 0
    assert "same logits: max |difference|" in capsys.readouterr().out


def test_one_swapped_head_is_found_by_bits_and_by_logits(tmp_path, capsys):
    model = make(tmp_path / "model", "qwen3")
    other = make(tmp_path / "other", "qwen3")
    name = "model.layers.1.self_attn.q_proj.weight"
    head_dim = ModelShape.read(model).head_dim
    tensors = load(other)
    first, second, rest = tensors[name].tensor_split([head_dim, 2 * head_dim])
    tensors[name] = torch.cat([second, first, rest])
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    assert to_megatron(other, tmp_path / "megatron") == 0
    capsys.readouterr()
    assert verify([str(model), str(tmp_path / "megatron")]) == 1
    shown = capsys.readouterr().out
    assert f"{name}: other values" in shown and "DIFFERENT: 1 of" in shown
    assert verify([str(model), str(tmp_path / "megatron"), "--logits"]) == 1
    assert "DIFFERENT LOGITS" in capsys.readouterr().out
