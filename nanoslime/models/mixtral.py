"""Mixtral: every layer has experts, which Hugging Face names w1 (gate), w3 (up) and w2
(down)."""

from nanoslime.models.blocks import ExpertNames, attention, ends, experts_mlp
from nanoslime.models.rules import Rule
from nanoslime.models.shape import Architecture, ConfigFile, ModelShape, MoE

_NAMES = ExpertNames(block="block_sparse_moe.", matrices=("w1", "w3", "w2"))


def _read(config: ConfigFile) -> ModelShape:
    moe = MoE(
        layers=tuple(range(config["num_hidden_layers"])),
        num_experts=config["num_local_experts"],
        num_experts_per_token=config["num_experts_per_tok"],
        intermediate_size=config["intermediate_size"],
    )
    return ModelShape(**config.sizes(), moe=moe)


def _rules(shape: ModelShape) -> list[Rule]:
    return [*ends(shape), *attention(shape), *experts_mlp(shape, _NAMES)]


MIXTRAL = Architecture(_read, _rules)
