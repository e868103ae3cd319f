"""The weight map against mbridge 0.15.1: its own functions for names and tensors, with
no model built.

For every Megatron tensor of a model: mbridge's Hugging Face names are ours, it makes
the same bits of them in both directions, and it cuts them over tensor parallelism as we
do. The names are those of Transformer Engine.

| family | class of mbridge | what it confirms |
|---|---|---|
| llama, llama3, qwen2, qwen3, mixtral, qwen3_moe | that of the model_type | everything |
| mistral | LLaMABridge, as mbridge has no mistral and its tensors are named as Llama's | everything |
| qwen2_moe | Qwen2MoEBridge | all but dense layers, of which mbridge knows no names |
| qwen3_moe_mixed | none, for its dense layers | nothing: the rules are those of qwen3 and qwen3_moe |
| glm4 | Glm4VLBridgeDense, the language model in GLM-4.1V; it has prefixes before the names | everything |
| glm4_moe | GLM4MoEBridge | everything and multi-token prediction; repeats: nothing |
| deepseek_v3 | DeepseekV3Bridge | everything, multi-token prediction and repeats of 61 layers |

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

from nanoslime.models.rules import ModelPartition, Piece, pieces, repeats, tensors
from nanoslime.models.shape import ModelShape
from tests.models.hf import FAMILIES, SIZES

VOCAB_SIZE = 256  # no padding at TP=2, which mbridge leaves to its caller
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
        vision = isinstance(bridge, bridges.Glm4VLBridgeDense)
        self._megatron, self._hf = (
            ("language_model.", "model.language_model.") if vision else ("", "model.")
        )

    def name(self, megatron: str) -> str:
        """mlp.experts.experts.3.linear_fc1.weight is mlp.experts.linear_fc1.weight3 in
        Transformer Engine."""
        head, experts, tail = megatron.partition("experts.experts.")
        if experts:
            expert, _, rest = tail.partition(".")
            megatron = f"{head}experts.{rest}{expert}"
        return self._megatron + megatron

    def to_hf(self, megatron: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        names, weights = self.bridge._weight_to_hf_format(self.name(megatron), weight)
        return {
            "model." + name.removeprefix(self._hf) if name.startswith(self._hf) else name: tensor
            for name, tensor in zip(names, weights, strict=True)
        }

    def to_megatron(self, megatron: str, weights: list[torch.Tensor]) -> torch.Tensor:
        return self.bridge._weight_to_mcore_format(self.name(megatron), weights)

    def cut(
        self, megatron: str, weight: torch.Tensor, local: torch.Tensor, ways: int
    ) -> list[torch.Tensor]:
        return list(self.bridge._weight_split_across_tp(self.name(megatron), weight, local, ways))


@pytest.fixture(params=CASES)
def case(request, monkeypatch):
    """(oracle, shape). Patched is what does not suit transformers 5, megatron-core 0.16
    or a second model:

    rope_theta, which has moved; a head_dim of null; a field of MLATransformerConfig
    that has another name; GLM-4V's config, which wants a vision tower; and a dictionary
    of the class, where Qwen2Bridge writes that the output layer is tied and it stays
    tied for every later model.
    """
    bridge_class, changes = CASES[request.param]
    config_class, own = FAMILIES[request.param]
    config = config_class(**{**SIZES, **own, **changes, "vocab_size": VOCAB_SIZE})
    config.rope_theta = 10000.0
    config.head_dim = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    monkeypatch.setattr(
        bridge_class, "_DIRECT_MAPPING", copy.deepcopy(bridge_class._DIRECT_MAPPING)
    )
    if bridge_class is bridges.DeepseekV3Bridge:
        renamed = {"max_position_embeddings": "original_max_position_embeddings"}
        monkeypatch.setattr(
            bridge_class,
            "TransformerConfigClass",
            staticmethod(
                lambda **kw: MLATransformerConfig(**{renamed.get(k, k): v for k, v in kw.items()})
            ),
        )
    if bridge_class is bridges.Glm4VLBridgeDense:
        monkeypatch.setattr(bridge_class, "TransformerConfigClass", TransformerConfig)
        monkeypatch.setattr(bridge_class, "_build_config", lambda self: self._build_base_config())
    oracle = Oracle(bridge_class(config, parallel_states=ParallelStates()))
    return oracle, ModelShape.from_config(config.to_dict())


def random_tensors(shape: ModelShape) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(full, generator=generator).to(
            torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        )
        for name, full in tensors(shape, mtp=True).items()
    }


def by_megatron_name(found: list[Piece]) -> dict[str, list[Piece]]:
    grouped = defaultdict(list)
    for piece in found:
        grouped[piece.megatron].append(piece)
    return grouped


def assemble(group: list[Piece], hf: dict[str, torch.Tensor]) -> torch.Tensor:
    """The rank's Megatron tensor, made of its pieces; NaN where no piece lies."""
    size = [max(piece.local[d].stop for piece in group) for d in range(len(group[0].local))]
    whole = torch.full(size, torch.nan, dtype=hf[group[0].hf].dtype)
    for piece in group:
        whole[piece.local] = hf[piece.hf][piece.box]
    return whole


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def test_every_tensor_has_mbridges_names_and_bits_both_ways(case):
    oracle, shape = case
    hf = random_tensors(shape)
    back, repeated = {}, set()
    for megatron, group in by_megatron_name(pieces(shape, ModelPartition(mtp=True))).items():
        mine = assemble(group, hf)
        parts = list(dict.fromkeys(piece.hf for piece in group))
        theirs = oracle.to_hf(megatron, mine)
        again = {name: theirs.pop(name) for name in repeats(shape) if name in theirs}
        assert list(theirs) == parts, megatron
        assert all(same(theirs[name], hf[name]) for name in parts), megatron
        assert all(same(tensor, hf[repeats(shape)[name]]) for name, tensor in again.items()), (
            megatron
        )
        assert same(oracle.to_megatron(megatron, [hf[name] for name in parts]), mine), megatron
        back |= theirs
        repeated |= again.keys()
    assert back.keys() == hf.keys()
    if isinstance(oracle.bridge, bridges.DeepseekV3Bridge):  # the only one that writes them
        assert repeated == repeats(shape).keys() and len(repeated) == 2 * shape.num_mtp_layers


def test_every_tensor_is_cut_over_tensor_parallelism_as_mbridge_cuts_it(case):
    oracle, shape = case
    hf = random_tensors(shape)
    whole = by_megatron_name(pieces(shape, ModelPartition(mtp=True)))
    ranks = [
        by_megatron_name(pieces(shape, ModelPartition(rank, 2, mtp=True))) for rank in range(2)
    ]
    num_cut = 0
    for megatron, group in whole.items():
        mine = [assemble(rank[megatron], hf) for rank in ranks]
        theirs = oracle.cut(megatron, assemble(group, hf), mine[0], 2)
        assert all(same(a, b) for a, b in zip(mine, theirs, strict=True)), megatron
        num_cut += not same(mine[0], mine[1])
    assert num_cut > len(whole) // 3


def test_a_tied_output_layer_is_mbridges_embedding(case):
    oracle, shape = case
    hf = random_tensors(shape)
    last = by_megatron_name(pieces(shape, ModelPartition(first=False)))["output_layer.weight"]
    theirs = oracle.to_hf("output_layer.weight", assemble(last, hf))
    assert next(iter(theirs)) == last[0].hf
