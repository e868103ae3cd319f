"""The weight map against mbridge 0.15.1: its own functions, with no model built.

For every Megatron tensor of a model: mbridge's Hugging Face names are ours, it makes the
same bits of them in both directions, and it cuts them over tensor parallelism as we do.
The names are those of Transformer Engine. The third column says what mbridge confirms.

| family | class of mbridge | confirmed |
|---|---|---|
| llama, llama3, qwen2, qwen3, mixtral, qwen3_moe | as the model_type | all |
| mistral | LLaMABridge: there is no other, and its tensors have Llama's names | all |
| qwen2_moe | Qwen2MoEBridge | all but dense layers, which mbridge cannot name |
| qwen3_moe_mixed | none, for its dense layers | none: qwen3's and qwen3_moe's rules |
| glm4 | Glm4VLBridgeDense, GLM-4.1V's language model, with prefixes | all |
| glm4_moe | GLM4MoEBridge | all, with multi-token prediction, without repeats |
| deepseek_v3 | DeepseekV3Bridge | all, with both, at 61 layers |

mbridge is made for older releases of transformers and megatron-core; the fixture names
what is patched.
"""

import copy
from collections import defaultdict

import mbridge.models as bridges
import pytest
import torch
from mbridge.core import Bridge
from mbridge.core.parallel_states import ParallelStates
from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from nanoslime.models.rules import FLOAT32, ModelPartition, Piece, pieces, repeats, tensors
from nanoslime.models.shape import ModelShape
from tests.models.hf import FAMILIES, SIZES

# Without padding at TP=2, which mbridge leaves to its caller.
VOCAB_SIZE = 256
ALL_SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": []}
DEEPSEEK = {
    "num_hidden_layers": 61,
    "hidden_size": 8,
    "intermediate_size": 12,
    "moe_intermediate_size": 4,
}
CASES = {
    "llama": (bridges.LLaMABridge, {}),
    "llama3": (bridges.LLaMABridge, {}),
    "mistral": (bridges.LLaMABridge, {}),
    "qwen2": (bridges.Qwen2Bridge, {}),
    "qwen2_untied": (bridges.Qwen2Bridge, {}),
    "qwen3": (bridges.Qwen3Bridge, {}),
    "qwen3_untied": (bridges.Qwen3Bridge, {}),
    "mixtral": (bridges.MixtralBridge, {}),
    "qwen2_moe": (bridges.Qwen2MoEBridge, ALL_SPARSE),
    "qwen3_moe": (bridges.Qwen3MoEBridge, {}),
    "glm4": (bridges.Glm4VLBridgeDense, {}),
    "glm4_no_bias": (bridges.Glm4VLBridgeDense, {}),
    "glm4_moe": (bridges.GLM4MoEBridge, {}),
    "glm4_moe_no_dense": (bridges.GLM4MoEBridge, {}),
    "deepseek_v3": (bridges.DeepseekV3Bridge, DEEPSEEK),
    "deepseek_v3_no_q_lora": (bridges.DeepseekV3Bridge, DEEPSEEK),
}


class Oracle:
    """mbridge's functions under the names of the weight map."""

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge
        self._megatron_prefix = ""
        self._hf_prefix = "model."
        if isinstance(bridge, bridges.Glm4VLBridgeDense):
            self._megatron_prefix = "language_model."
            self._hf_prefix = "model.language_model."

    def name(self, megatron: str) -> str:
        """The name in Transformer Engine, which puts an expert's number at the end.

        mlp.experts.experts.3.linear_fc1.weight is mlp.experts.linear_fc1.weight3 there.
        """
        head, experts, tail = megatron.partition("experts.experts.")
        if experts:
            expert, _, rest = tail.partition(".")
            megatron = f"{head}experts.{rest}{expert}"
        return self._megatron_prefix + megatron

    def to_hf(self, megatron: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        names, weights = self.bridge._weight_to_hf_format(self.name(megatron), weight)
        found = {}
        for name, tensor in zip(names, weights, strict=True):
            if name.startswith(self._hf_prefix):
                name = "model." + name.removeprefix(self._hf_prefix)
            found[name] = tensor
        return found

    def to_megatron(self, megatron: str, weights: list[torch.Tensor]) -> torch.Tensor:
        return self.bridge._weight_to_mcore_format(self.name(megatron), weights)

    def cut(
        self, megatron: str, weight: torch.Tensor, local: torch.Tensor, ways: int
    ) -> list[torch.Tensor]:
        return list(self.bridge._weight_split_across_tp(self.name(megatron), weight, local, ways))


def mla_config(**values: object) -> MLATransformerConfig:
    """MLATransformerConfig by mbridge's name of a field that has another one now."""
    values["original_max_position_embeddings"] = values.pop("max_position_embeddings")
    return MLATransformerConfig(**values)


@pytest.fixture(params=CASES)
def case(request, monkeypatch):
    """(oracle, shape), with mbridge patched for transformers 5 and a newer megatron-core.

    rope_theta has moved, head_dim may be null, a field of MLATransformerConfig has another
    name, and GLM-4V's configuration wants a vision tower. A dictionary of the class is
    copied: Qwen2Bridge writes into it that the output layer is tied, and it would stay
    tied for every later model.
    """
    bridge_class, changes = CASES[request.param]
    config_class, own = FAMILIES[request.param]
    config = config_class(**{**SIZES, **own, **changes, "vocab_size": VOCAB_SIZE})
    config.rope_theta = 10000.0
    if getattr(config, "head_dim", None) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    mapping = copy.deepcopy(bridge_class._DIRECT_MAPPING)
    monkeypatch.setattr(bridge_class, "_DIRECT_MAPPING", mapping)
    if bridge_class is bridges.DeepseekV3Bridge:
        monkeypatch.setattr(bridge_class, "TransformerConfigClass", staticmethod(mla_config))
    if bridge_class is bridges.Glm4VLBridgeDense:
        monkeypatch.setattr(bridge_class, "TransformerConfigClass", TransformerConfig)
        monkeypatch.setattr(bridge_class, "_build_config", bridge_class._build_base_config)
    oracle = Oracle(bridge_class(config, parallel_states=ParallelStates()))
    return oracle, ModelShape.from_config(config.to_dict())


def random_tensors(shape: ModelShape) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, full_shape in tensors(shape, mtp=True).items():
        dtype = torch.float32 if name.endswith(FLOAT32) else torch.bfloat16
        found[name] = torch.randn(full_shape, generator=generator).to(dtype)
    return found


def by_megatron_name(found: list[Piece]) -> dict[str, list[Piece]]:
    grouped = defaultdict(list)
    for piece in found:
        grouped[piece.megatron].append(piece)
    return grouped


def assemble(group: list[Piece], hf: dict[str, torch.Tensor]) -> torch.Tensor:
    """The rank's Megatron tensor, made of its pieces; NaN where no piece lies."""
    num_dims = len(group[0].local)
    size = [max(piece.local[dim].stop for piece in group) for dim in range(num_dims)]
    whole = torch.full(size, torch.nan, dtype=hf[group[0].hf].dtype)
    for piece in group:
        whole[piece.local] = hf[piece.hf][piece.box]
    return whole


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def test_every_tensor_has_mbridges_names_and_bits_both_ways(case):
    oracle, shape = case
    hf = random_tensors(shape)
    repeated = repeats(shape)
    written = set()
    written_again = set()
    for megatron, group in by_megatron_name(pieces(shape, ModelPartition(mtp=True))).items():
        mine = assemble(group, hf)
        names = list(dict.fromkeys(piece.hf for piece in group))
        theirs = oracle.to_hf(megatron, mine)
        again = {name: theirs.pop(name) for name in repeated if name in theirs}
        assert list(theirs) == names, megatron
        for name in names:
            assert same(theirs[name], hf[name]), (megatron, name)
        for name, tensor in again.items():
            assert same(tensor, hf[repeated[name]]), (megatron, name)
        assert same(oracle.to_megatron(megatron, [hf[name] for name in names]), mine), megatron
        written.update(theirs)
        written_again.update(again)
    assert written == hf.keys()
    if isinstance(oracle.bridge, bridges.DeepseekV3Bridge):
        # This bridge alone writes the repeats.
        assert written_again == repeated.keys()
        assert len(written_again) == 2 * shape.num_mtp_layers


def test_every_tensor_is_cut_over_tensor_parallelism_as_mbridge_cuts_it(case):
    oracle, shape = case
    hf = random_tensors(shape)
    whole = by_megatron_name(pieces(shape, ModelPartition(mtp=True)))
    first = by_megatron_name(pieces(shape, ModelPartition(0, 2, mtp=True)))
    second = by_megatron_name(pieces(shape, ModelPartition(1, 2, mtp=True)))
    num_cut = 0
    for megatron, group in whole.items():
        mine = [assemble(first[megatron], hf), assemble(second[megatron], hf)]
        theirs = oracle.cut(megatron, assemble(group, hf), mine[0], 2)
        assert len(theirs) == 2
        assert same(mine[0], theirs[0]), megatron
        assert same(mine[1], theirs[1]), megatron
        num_cut += not same(mine[0], mine[1])
    assert num_cut > len(whole) // 3


def test_a_tied_output_layer_is_mbridges_embedding(case):
    oracle, shape = case
    hf = random_tensors(shape)
    last = by_megatron_name(pieces(shape, ModelPartition(first=False)))["output_layer.weight"]
    theirs = oracle.to_hf("output_layer.weight", assemble(last, hf))
    assert next(iter(theirs)) == last[0].hf
