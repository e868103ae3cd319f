"""The recipes for real work: their plans, on nodes of eight GPUs of 80 GB, are kept as text.

What is in `plans/` changes with the planner, on purpose: delete a file there, run this, and look at
what it is now.
"""

from pathlib import Path

import pytest

from nanoslime.config.load import load, set_by
from nanoslime.models.shape import ModelShape
from tests.models.published import CONFIGS
from tools.memory.plan import plan
from tools.submit.choose import choose, shortage
from tools.submit.grpo import RECIPES
from tools.submit.plan_text import describe

PLANS = Path(__file__).with_name("plans")
QWEN3_0P6B = CONFIGS["Qwen3-4B"] | {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
}
RECIPES_OF_MODELS = {
    "qwen3_4b_dapo_4x8": CONFIGS["Qwen3-4B"],
    "qwen3_30b_a3b_dapo_8x8": CONFIGS["Qwen3-30B-A3B"],
    "qwen3_4b_1gpu": CONFIGS["Qwen3-4B"],
    "qwen3_0p6b_1node_fsdp": QWEN3_0P6B,
}
# Where the prompts are; experts are planned without a look for Transformer Engine.
FLAGS = ["--prompts", "train.jsonl", "--eval-prompts", "test.jsonl", "--allow-slow"]


@pytest.mark.parametrize("name", RECIPES_OF_MODELS)
def test_the_plan_of_a_recipe_is_the_one_that_is_kept(name):
    recipe = RECIPES / f"{name}.yaml"
    gpus = [] if name == "qwen3_4b_1gpu" else ["--cluster.gpus-per-node", "8"]
    flags = FLAGS + gpus
    config = load(recipe, None, flags)
    shape = ModelShape.from_config(RECIPES_OF_MODELS[name])
    sources = set_by(recipe, None, flags)
    assert choose(config, shape, sources) == {}
    layout = plan(config, shape)
    assert shortage(config, shape, layout) == ""
    text = describe(config, shape, layout, ["train.jsonl: 100 prompts"], sources)
    # How much is free on this machine's disk is no part of the plan.
    kept = [line for line in (text + "\n").splitlines() if "disk: " not in line]
    golden = PLANS / f"{name}.txt"
    if not golden.exists():
        golden.write_text("\n".join(kept) + "\n")
        pytest.fail(f"{golden} was not there and has been written; look at it")
    assert kept == golden.read_text().splitlines()


@pytest.mark.parametrize("name", RECIPES_OF_MODELS)
def test_a_recipe_says_how_it_is_started(name):
    assert name in (RECIPES / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", RECIPES_OF_MODELS)
def test_without_a_cluster_file_no_recipe_asks_for_more_than_its_title_says(name):
    config = load(RECIPES / f"{name}.yaml", None, [])
    nodes, gpus = {"4x8": (4, 0), "8x8": (8, 0), "1gpu": (1, 1), "fsdp": (1, 8)}[
        name.split("_")[-1]
    ]
    assert (config.cluster.nodes, config.cluster.gpus_per_node) == (nodes, gpus)
