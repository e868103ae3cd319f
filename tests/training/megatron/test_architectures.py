"""The real GPTModel of every architecture against transformers, which judges the weight map."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch
import torch.distributed as dist
import transformers
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.transformer import multi_latent_attention
from safetensors.torch import load_file, save_file

from nanoslime.algorithms.grpo import GRPO
from nanoslime.models.shape import ModelShape
from nanoslime.training.megatron.local_layers import _layer_spec
from nanoslime.training.megatron.model import model_config
from nanoslime.weight_sync.plan import TrainerWeights
from tests.models.hf import FAMILIES, SIZES, save_model
from tests.training.parity import KL, RELATIVE, Layout, grad_shards, make_backend, train_batch
from tests.training.reference import make_step, reference
from tests.weight_sync.gathered import whole_tensors
from tools.conversion.gpt_logits import logits

pytestmark = pytest.mark.megatron

TOKENS = torch.randint(0, 250, (120,), generator=torch.Generator().manual_seed(0))
REFUSED = ("glm4", "glm4_no_bias")
BUILT = [family for family in FAMILIES if family not in REFUSED]
SENSITIVE = ["qwen3", "mixtral", "qwen2_moe", "glm4_moe", "deepseek_v3"]  # one of each kind
NOISE = 1e-5  # of float32
DAMAGE = 1e-3  # the least that a misplaced tensor does to the logits


def changes(family: str) -> dict[str, object]:
    """Changes to a family's tiny config.

    There are experts enough for a choice within a group. transformers' DeepSeek-V3
    takes no fewer key heads.
    """
    found: dict[str, object] = {}
    if family.startswith("deepseek"):
        found["num_key_value_heads"] = 4
    if family.startswith(("deepseek", "glm4_moe")):
        found["n_routed_experts"] = 8
    return found


@pytest.fixture(scope="module")
def model(request, tmp_path_factory):
    """The directory, and the logits that transformers computes from it."""
    family = request.param
    directory = save_model(tmp_path_factory.mktemp("model"), family, **changes(family))
    tensors = load_file(directory / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= 4  # so that tokens differ more, and reach more experts
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    hf = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    with torch.no_grad():
        return directory, hf.eval()(TOKENS[None]).logits[0]


def difference(directory, expected):
    found = logits(ModelShape.read(directory), directory, TOKENS)
    return float((found - expected).abs().max())


@pytest.mark.parametrize("model", BUILT, indirect=True)
def test_logits_are_those_of_transformers(model):
    directory, expected = model
    assert difference(directory, expected) < NOISE
    assert expected.abs().max() > 1
    assert not dist.is_initialized()


def test_latent_attention_has_its_layers_where_cpu_compat_does_nothing(monkeypatch):
    """On CUDA without Transformer Engine too, where megatron-core imports no Linear."""
    monkeypatch.setattr(multi_latent_attention, "Linear", None)
    config_class, own = FAMILIES["deepseek_v3"]
    hf_config = config_class(**{**SIZES, **own, **changes("deepseek_v3")})
    shape = ModelShape.from_config(hf_config.to_dict())
    settings = model_config(shape, torch.float32, torch.device("cpu"))
    _layer_spec(settings, num_experts=None)
    assert multi_latent_attention.Linear is Linear


def test_no_notice_of_deprecation_is_logged(caplog, tmp_path):
    directory = save_model(tmp_path, "llama")
    with caplog.at_level(logging.WARNING):
        logits(ModelShape.read(directory), directory, TOKENS)
        logging.getLogger("megatron.core.models.gpt.gpt_model").warning("another warning")
    assert caplog.messages == ["another warning"]


def exchanged(tensors, pairs):
    """The tensors, with the two of each pair of names exchanged."""
    found = dict(tensors)
    for one, other in pairs:
        found[one] = tensors[other]
        found[other] = tensors[one]
    return found


def exchanged_heads(tensors):
    """Two query heads of one layer; of one group, where there are groups."""
    ends = ("layers.2.self_attn.q_proj.weight", "layers.2.self_attn.q_b_proj.weight")
    (name,) = [name for name in tensors if name.endswith(ends)]
    first, second, *rest = tensors[name].chunk(4)
    yield "two heads", {**tensors, name: torch.cat([second, first, *rest])}


def exchanged_experts(tensors):
    first = [name for name in tensors if "layers.3." in name and ".experts.0." in name]
    if first:
        assert len(first) == 3
        pairs = [(name, name.replace(".experts.0.", ".experts.1.")) for name in first]
        yield "two experts", exchanged(tensors, pairs)


def exchanged_gate_and_up(tensors):
    for name in tensors:
        if "layers.3." not in name:
            continue
        if ".experts." in name and ".experts.1." not in name:
            continue
        for gate, up in (("gate_proj", "up_proj"), (".w1.", ".w3.")):
            if gate in name:
                yield name, exchanged(tensors, [(name, name.replace(gate, up))])


def forgotten(tensors):
    """Norms at their initial value; and the biases of the experts' scores."""
    biases = {}
    for name, tensor in tensors.items():
        is_norm_of_layer = "layers.3." in name and "norm" in name
        if is_norm_of_layer or name == "model.norm.weight":
            yield name, {**tensors, name: torch.ones_like(tensor)}
        if name.endswith("_correction_bias"):
            biases[name] = torch.zeros_like(tensor)
    if biases:
        yield "score biases", {**tensors, **biases}


@pytest.mark.parametrize("model", SENSITIVE, indirect=True)
@pytest.mark.parametrize(
    "damage", [exchanged_heads, exchanged_experts, exchanged_gate_and_up, forgotten]
)
def test_a_misplaced_tensor_shows_in_the_logits(model, tmp_path, damage):
    directory, expected = model
    shutil.copy(directory / "config.json", tmp_path)
    for name, tensors in damage(load_file(directory / "model.safetensors")):
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, tmp_path / "model.safetensors")
        assert difference(tmp_path, expected) > DAMAGE, name


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
    config_class, own = FAMILIES[family]
    hf_config = config_class(**{**SIZES, **own, **changed})
    shape = ModelShape.from_config(hf_config.to_dict())
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
        names = {shard.name for shard in backend.weight_shards()}
        without_gradient = names - {shard.name for shard in grad_shards(backend)}
        assert all(name.endswith("e_score_correction_bias") for name in without_gradient)
    finally:
        dist.destroy_process_group()


def test_in_bfloat16_the_bias_of_the_scores_stays_float32_and_as_it_was(tmp_path):
    directory = save_model(tmp_path, "glm4_moe", dtype=torch.bfloat16)
    backend = make_backend(Layout(dtype="bfloat16"), directory, 0, tmp_path / "rendezvous")
    try:
        backend.train_step(train_batch(make_step(directory, 0)), GRPO(KL))
        files = load_file(directory / "model.safetensors")
        biases = [s for s in backend.weight_shards() if s.name.endswith("e_score_correction_bias")]
        assert len(biases) == 3
        rounded = 0
        weights = TrainerWeights(
            backend.weight_shards,
            backend.owned_shards(),
            rank=0,
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
        )
        sent = whole_tensors(weights)
        for bias in biases:
            assert bias.tensor.dtype == torch.float32
            assert torch.equal(bias.tensor, files[bias.name])
            assert torch.equal(sent.pop(bias.name), files[bias.name])
            rounded += not torch.equal(bias.tensor, bias.tensor.bfloat16())
        assert rounded, "the bits matter"
        assert {tensor.dtype for tensor in sent.values()} == {torch.bfloat16}
    finally:
        dist.destroy_process_group()
