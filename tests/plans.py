"""Models and plans that several test files share."""

from dataclasses import replace

from nanoslime.config import RunConfig
from nanoslime.config.load import load
from nanoslime.layout import Layout
from nanoslime.models.shape import ModelShape
from tests.models.published import CONFIGS
from tools.memory.plan import plan

TINY = ModelShape(
    model_type="qwen3",
    num_layers=2,
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=320,
    max_position_embeddings=128,
    tie_word_embeddings=False,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    qk_norm=True,
)
QWEN3_4B = replace(
    TINY,
    num_layers=36,
    hidden_size=2560,
    intermediate_size=9728,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
    tie_word_embeddings=True,
)
# 128 experts of 768 in every layer.
QWEN3_30B_A3B = ModelShape.from_config(CONFIGS["Qwen3-30B-A3B"])

# Flags for nodes of eight H200.
H200 = "--cluster.gpus-per-node 8 --cluster.gpu-memory-gib 140"


def config_of(flags: str) -> RunConfig:
    return load(None, None, flags.split())


def plan_of(flags: str, shape: ModelShape = TINY) -> Layout:
    return plan(config_of(flags), shape)
