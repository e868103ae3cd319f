"""Sizes that nobody has set: what is chosen fits, what is set stays, and refusals name ways out."""

import re
from dataclasses import replace

import pytest

from nanoslime.config.load import load, set_by
from nanoslime.models.shape import ModelShape
from nanoslime.types import RunError
from tests.models.published import CONFIGS
from tests.plans import QWEN3_30B_A3B, TINY
from tools.memory.plan import plan
from tools.submit.choose import SIZES, choose, fitting, shortage, ways_out, with_sizes

QWEN3_4B = ModelShape.from_config(CONFIGS["Qwen3-4B"])
LLAMA_70B = replace(
    TINY,
    num_layers=80,
    hidden_size=8192,
    intermediate_size=28672,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_position_embeddings=131072,
    qk_norm=False,
    model_type="llama",
)
# Transformer Engine is not looked for.
NODES_80 = "--cluster.gpus-per-node 8 --cluster.gpu-memory-gib 80 --allow-slow"


@pytest.fixture(autouse=True)
def _enough_time(monkeypatch):
    """Whatever else this machine does."""
    monkeypatch.setattr("tools.submit.choose._SEARCH_S", 60.0)


def chosen(flags: str, shape: ModelShape):
    """The configuration of the flags, and the sizes that are chosen for it."""
    words = flags.split()
    config = load(None, None, words)
    return config, choose(config, shape, set_by(None, None, words))


@pytest.mark.parametrize(
    ("flags", "shape", "sizes"),
    [
        ("--nodes 4", QWEN3_4B, {}),
        ("--nodes 4 --max-new-tokens 32768", QWEN3_4B, {"training.tp_size": 4}),
        ("--nodes 4", QWEN3_30B_A3B, {"training.tp_size": 2, "training.ep_size": 8}),
        (
            "--nodes 8",
            LLAMA_70B,
            {"training.tp_size": 8, "training.pp_size": 2, "rollout.engine_tp_size": 4},
        ),
        (
            "--nodes 4",
            LLAMA_70B,
            {
                "cluster.rollout_nodes": 1,
                "training.tp_size": 8,
                "training.pp_size": 3,
                "rollout.engine_tp_size": 4,
            },
        ),
    ],
)
def test_the_number_of_nodes_is_enough(flags, shape, sizes):
    config, found = chosen(f"{NODES_80} {flags}", shape)
    if sizes:
        sizes = sizes | {"training.sequence_parallel": True}
    assert found == sizes
    config = with_sizes(config, found)
    assert shortage(config, shape, plan(config, shape)) == ""


@pytest.mark.parametrize(
    "given",
    ["--tp-size 4", "--ep-size 16", "--pp-size 2", "--engine-tp-size 8", "--rollout-nodes 1"],
)
def test_what_is_set_stays_and_the_rest_is_chosen_around_it(given):
    config, found = chosen(f"{NODES_80} --nodes 4 {given}", QWEN3_30B_A3B)
    field = load(None, None, given.split()) and next(iter(set_by(None, None, given.split())))
    assert found and field in SIZES and field not in found
    config = with_sizes(config, found)
    assert shortage(config, QWEN3_30B_A3B, plan(config, QWEN3_30B_A3B)) == ""
    section, leaf = field.split(".")
    assert getattr(getattr(config, section), leaf) == int(given.split()[1])


def test_nothing_is_chosen_where_nothing_free_helps_or_memory_is_not_the_matter():
    everything = "--tp-size 1 --pp-size 1 --ep-size 1"
    assert chosen(f"{NODES_80} --nodes 4 {everything}", QWEN3_30B_A3B)[1] == {}
    assert chosen(f"{NODES_80} --nodes 1", LLAMA_70B)[1] == {}
    assert chosen("--nodes 4", TINY)[1] == {}


@pytest.mark.parametrize(
    ("flags", "shape", "says"),
    [
        ("--nodes 4", QWEN3_30B_A3B, r"These fit: --tp-size 2 --ep-size 8 --sequence-parallel; "),
        ("--nodes 2", QWEN3_30B_A3B, r"These fit: --nodes 4 --tp-size 2 --ep-size 8 "),
        ("--nodes 1", LLAMA_70B, r"These fit: --nodes 4 --backend megatron --rollout-nodes 1 --tp"),
        ("--nodes 4 --engine-tp-size 3", QWEN3_30B_A3B, r"^$"),
    ],
)
def test_a_refusal_for_memory_names_layouts_that_fit(flags, shape, says):
    config = load(None, None, f"{NODES_80} {flags}".split())
    with pytest.raises(RunError):
        plan(config, shape)
    told = ways_out(config, shape)
    assert re.search(says, told)
    for way in told.removeprefix(". These fit: ").split("; ") if told else []:
        better = load(None, None, f"{NODES_80} {flags} {way}".split())
        assert shortage(better, shape, plan(better, shape)) == ""


def planned_for(monkeypatch, search) -> int:
    """How many layouts a search looks at."""
    looked_at = []

    def counted(config, shape, sizes):
        looked_at.append(sizes)
        return fitting(config, shape, sizes)

    monkeypatch.setattr("tools.submit.choose.fitting", counted)
    monkeypatch.setattr("tools.submit.choose._SEARCH_S", 1000.0)
    search()
    return len(looked_at)


@pytest.mark.parametrize(
    ("flags", "shape", "most"),
    [
        ("--nodes 32", QWEN3_30B_A3B, 400),
        ("--nodes 32", LLAMA_70B, 400),
        # Nothing fits, on four times as many nodes neither.
        ("--nodes 32 --cluster.gpu-memory-gib 10", QWEN3_30B_A3B, 2000),
        ("--nodes 2", QWEN3_30B_A3B, 400),
    ],
)
def test_a_search_looks_at_few_layouts(monkeypatch, flags, shape, most):
    """A layout takes a few milliseconds; all sizes of 32 nodes would be 61,440 layouts."""
    config = load(None, None, f"{NODES_80} {flags}".split())
    assert planned_for(monkeypatch, lambda: choose(config, shape, {})) < most
    assert planned_for(monkeypatch, lambda: ways_out(config, shape)) < most


def test_what_no_sizes_help_against_is_refused_before_any_search(monkeypatch):
    """The environment of the job is there, and has no Transformer Engine."""
    flags = NODES_80.replace("--allow-slow", "--cluster.venv .")
    config = load(None, None, f"{flags} --nodes 32".split())

    def refused():
        with pytest.raises(RunError, match="without Transformer Engine experts"):
            choose(config, QWEN3_30B_A3B, {})

    assert planned_for(monkeypatch, refused) == 0


def test_a_search_that_takes_too_long_is_cut_and_says_so(monkeypatch):
    monkeypatch.setattr("tools.submit.choose._SEARCH_S", -1.0)
    config = load(None, None, f"{NODES_80} --nodes 4".split())
    assert "found no layout that fits, and was cut" in ways_out(config, QWEN3_30B_A3B)


def test_a_job_that_may_not_have_more_nodes_is_not_told_to_take_them():
    """2 nodes of 8 GPUs for 8 hours are all that the site allows."""
    flags = f"{NODES_80} --nodes 2 --cluster.max-gpu-hours 128 --time-limit-min 480"
    config = load(None, None, flags.split())
    assert choose(config, LLAMA_70B, {}) == {}
    said = ways_out(config, LLAMA_70B)
    assert said == ". No layout on 2 nodes fits either, and this job may not have more"


def test_a_pipeline_that_is_set_is_kept_whatever_its_length_is():
    _, found = chosen(f"{NODES_80} --nodes 10 --pp-size 5", LLAMA_70B)
    assert found["training.tp_size"] == 8 and "training.pp_size" not in found
