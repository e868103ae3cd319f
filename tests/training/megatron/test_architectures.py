"""The real GPTModel of every architecture against transformers: the oracle of the weight map's rows."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file

from nanoslime.algorithms.grpo import GRPO
from nanoslime.models.shape import ModelShape
from nanoslime.training.megatron.forward import logits
from nanoslime.training.megatron.model import model_config
from nanoslime.weight_sync.assemble import Assembler
from tests.models.hf import FAMILIES, SIZES, save_model
from tests.training.parity import KL, RELATIVE, Layout, make_backend, train_batch
from tests.training.reference import make_step, reference

pytestmark = pytest.mark.megatron
TOKENS = torch.randint(0, 250, (120,), generator=torch.Generator().manual_seed(0))
BUILT = [
    family for family in FAMILIES if not family.startswith("glm4") or family.startswith("glm4_moe")
]
SENSITIVE = ["qwen3", "mixtral", "qwen2_moe", "glm4_moe", "deepseek_v3"]  # one of each kind
NOISE, DAMAGE = 1e-5, 1e-3  # of float32; the least that a misplaced tensor does to the logits


def changes(family: str) -> dict[str, object]:
    """Experts enough for a choice within a group; and transformers' DeepSeek-V3 takes no fewer key heads."""
    latent = {"num_key_value_heads": 4} if family.startswith("deepseek") else {}
    return latent | ({"n_routed_experts": 8} if family.startswith(("deepseek", "glm4_moe")) else {})


@pytest.fixture(scope="module")
def model(request, tmp_path_factory):
    """The directory, and the logits that transformers computes from it."""
    directory = save_model(
        tmp_path_factory.mktemp("model"), request.param, **changes(request.param)
    )
    tensors = load_file(directory / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= 4  # so that tokens differ more, and reach more experts
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    hf = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    with torch.no_grad():
        return directory, hf.eval()(TOKENS[None]).logits[0]


def difference(directory, expected):
    return float((logits(ModelShape.read(directory), directory, TOKENS) - expected).abs().max())


@pytest.mark.parametrize("model", BUILT, indirect=True)
def test_logits_are_those_of_transformers(model):
    directory, expected = model
    assert difference(directory, expected) < NOISE
    assert expected.abs().max() > 1
    assert not dist.is_initialized()


def swapped(tensors, pairs):
    return tensors | {one: tensors[other] for pair in pairs for one, other in (pair, pair[::-1])}


def swapped_heads(tensors):
    """Two query heads of one layer; of one group, where there are groups."""
    ends = ("layers.2.self_attn.q_proj.weight", "layers.2.self_attn.q_b_proj.weight")
    (name,) = [name for name in tensors if name.endswith(ends)]
    first, second, *rest = tensors[name].chunk(4)
    yield "two heads", tensors | {name: torch.cat([second, first, *rest])}


def swapped_experts(tensors):
    first = [name for name in tensors if "layers.3." in name and ".experts.0." in name]
    if first:
        assert len(first) == 3
        pairs = [(name, name.replace(".experts.0.", ".experts.1.")) for name in first]
        yield "two experts", swapped(tensors, pairs)


def swapped_gate_and_up(tensors):
    for gate, up in (("gate_proj", "up_proj"), (".w1.", ".w3.")):
        for name in tensors:
            if (
                "layers.3." in name
                and gate in name
                and (".experts.1." in name or ".experts." not in name)
            ):
                yield name, swapped(tensors, [(name, name.replace(gate, up))])


def forgotten(tensors):
    """Norms at their initial value; and the biases of the experts' scores."""
    for name, tensor in tensors.items():
        if "layers.3." in name and "norm" in name or name == "model.norm.weight":
            yield name, tensors | {name: torch.ones_like(tensor)}
    biases = {
        name: torch.zeros_like(t)
        for name, t in tensors.items()
        if name.endswith("_correction_bias")
    }
    if biases:
        yield "score biases", tensors | biases


@pytest.mark.parametrize("model", SENSITIVE, indirect=True)
@pytest.mark.parametrize("damage", [swapped_heads, swapped_experts, swapped_gate_and_up, forgotten])
def test_a_misplaced_tensor_shows_in_the_logits(model, tmp_path, damage):
    directory, expected = model
    shutil.copy(directory / "config.json", tmp_path)
    for what, tensors in damage(load_file(directory / "model.safetensors")):
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(whole, tmp_path / "model.safetensors")
        assert difference(tmp_path, expected) > DAMAGE, what


@pytest.mark.parametrize(
    ("family", "changed", "message"),
    [
        ("glm4", {}, "it lacks norms after attention and MLP"),
        ("mistral", {"sliding_window": 16}, "it lacks sliding_window=16"),
        ("deepseek_v3", {"rope_interleave": False}, "it lacks rope_interleave=false"),
        (
            "glm4_moe",
            {"norm_topk_prob": False},
            "it lacks norm_topk_prob=False with 2 sigmoid scores",
        ),
        (
            "deepseek_v3",
            {"num_experts_per_tok": 1},
            "it lacks norm_topk_prob=True with 1 sigmoid scores",
        ),
        (
            "deepseek_v3",
            {"num_experts_per_tok": 4},
            "it lacks groups of experts ranked by two scores",
        ),
    ],
)
def test_what_megatron_core_computes_otherwise_is_refused(family, changed, message):
    kind, own = FAMILIES[family]
    shape = ModelShape.from_config(kind(**SIZES | own | changed).to_dict())
    with pytest.raises(
        ValueError, match=f"megatron-core cannot compute this {shape.model_type}: .*{message}"
    ):
        model_config(shape, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("family", ["qwen2_moe", "glm4_moe", "deepseek_v3"])
def test_a_step_of_training_is_that_of_plain_pytorch(family, tmp_path):
    directory = save_model(tmp_path, family, **changes(family))
    steps = [make_step(directory, number) for number in range(2)]
    expected = reference(directory, steps).steps
    backend = make_backend(Layout(), directory, 0, tmp_path / "rendezvous")
    try:
        for step, target in zip(steps, expected, strict=True):
            found = backend.train_step(train_batch(step), GRPO(KL))
            assert found.loss == pytest.approx(target.loss, rel=RELATIVE)
            assert found.grad_norm == pytest.approx(target.grad_norm, rel=RELATIVE)
        names = {s.name for s in backend.weight_shards()} - {s.name for s in backend.grad_shards()}
        assert all(name.endswith("e_score_correction_bias") for name in names)
    finally:
        dist.destroy_process_group()


def test_in_bfloat16_the_bias_of_the_scores_stays_float32_and_as_it_was(tmp_path):
    directory = save_model(tmp_path, "glm4_moe", dtype=torch.bfloat16)
    backend = make_backend(Layout(dtype="bfloat16"), directory, 0, tmp_path / "rendezvous")
    try:
        backend.train_step(train_batch(make_step(directory, 0)), GRPO(KL))
        files = load_file(directory / "model.safetensors")
        biases = [s for s in backend.weight_shards() if s.name.endswith("e_score_correction_bias")]
        assert len(biases) == 3 and all(torch.equal(s.tensor, files[s.name]) for s in biases)
        assert {s.tensor.dtype for s in biases} == {torch.float32}
        place = {"rank": 0, "world_size": 1, "device": torch.device("cpu")}
        sent = dict(Assembler(backend.weight_shards, dtype=torch.bfloat16, **place).tensors())
        assert all(torch.equal(sent.pop(s.name), files[s.name]) for s in biases)
        assert not all(torch.equal(s.tensor, s.tensor.bfloat16()) for s in biases), (
            "the bits matter"
        )
        assert {tensor.dtype for tensor in sent.values()} == {torch.bfloat16}
    finally:
        dist.destroy_process_group()
