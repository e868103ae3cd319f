"""The plan as a person reads it, as text."""

from dataclasses import replace

from nanoslime.config.load import load, set_by
from nanoslime.models.parallel_sizes import ParallelDims
from tests.plans import H200, QWEN3_4B, config_of
from tools.memory.plan import plan
from tools.submit.plan_text import describe


def text_of(flags: str, shape=QWEN3_4B) -> str:
    config = config_of(flags)
    return describe(config, shape, plan(config, shape))


def test_a_plan_without_evaluations_says_so():
    says = "evals     none, as neither data.eval_prompts nor eval.sets is set; eval.interval and"
    for flags, is_told in ("", True), ("--eval-prompts x.jsonl", False):
        config = config_of(f"--nodes 2 {H200} {flags}")
        assert (says in describe(config, QWEN3_4B, plan(config, QWEN3_4B))) is is_told


def test_the_description_shows_context_parallelism_and_interleaving():
    sizes = "--tp-size 2 --cp-size 2 --pp-size 2 --vpp-size 9"
    config = config_of(f"--nodes 4 {H200} {sizes} --allow-slow")
    layout = plan(config, QWEN3_4B)
    assert layout.parallel == ParallelDims(tp=2, pp=2, cp=2, ep=1, dp=2)
    text = describe(config, QWEN3_4B, layout)
    assert "Megatron: TP=2 CP=2 PP=2 (interleaved by 9) DP=2" in text
    _, first_node, second_node, *_ = layout.table().splitlines()
    assert first_node.split()[3:7] == ["0-1", "0-1", "0-1", "0"]
    assert second_node.split()[3:7] == ["0-1", "0-1", "0-1", "1"]


def test_the_description_shows_the_layers_of_an_uneven_pipeline():
    shape = replace(QWEN3_4B, num_layers=94)
    flags = f"--nodes 4 {H200} --tp-size 2 --pp-size 4"
    given = f"{flags} --decoder-first-pipeline-num-layers 22 --decoder-last-pipeline-num-layers 22"
    for sizes, expected in ((flags, "23 + 24 + 24 + 23"), (given, "22 + 25 + 25 + 22")):
        config = config_of(sizes)
        text = describe(config, shape, plan(config, shape))
        assert f"TP=2 CP=1 PP=4 with {expected} layers DP=2" in text


def test_the_description_says_what_a_person_needs_to_know():
    config = config_of(f"--nodes 4 {H200} --tp-size 2 --time-limit-min 90")
    text = describe(config, QWEN3_4B, plan(config, QWEN3_4B))
    assert "4 x 8 GPUs; at most 48 GPU hours (32 GPUs for 1.5 h)" in text
    assert "Megatron: TP=2 CP=1 PP=1 DP=8" in text
    assert "SGLang: 16 of 1 GPU(s) each" in text
    assert [line.split() for line in text.splitlines()[3:7]] == [
        ["0", "trainer", "0-7", "0-1", "0", "0-3", "0", "-", "-"],
        ["1", "trainer", "8-15", "0-1", "0", "4-7", "0", "-", "-"],
        ["2", "engine", "-", "-", "-", "-", "-", "0-7", "0-7"],
        ["3", "engine", "-", "-", "-", "-", "-", "8-15", "0-7"],
    ]


def test_the_description_says_that_one_node_means_fsdp():
    config = config_of(f"--nodes 1 {H200}")
    text = describe(config, QWEN3_4B, plan(config, QWEN3_4B))
    assert "FSDP2 (what one node gets without --backend)" in text


def test_the_step_is_counted_in_prompts_samples_and_tokens():
    text = text_of(
        f"--nodes 4 {H200} --tp-size 2 --rollout-batch-size 128 --n-samples-per-prompt 16 "
        "--max-new-tokens 3584 --max-prompt-tokens 512 --num-steps-per-rollout 4",
        replace(QWEN3_4B, max_position_embeddings=40960),
    )
    assert "step      128 prompts x 16 samples = 2,048 samples, at most 8,388,608 tokens;" in text
    assert "4 optimizer step(s) a rollout, of 512 samples: 64 for each of the DP=8 ranks" in text
    assert "longest sequence 4,096 tokens (512 of the prompt + 3,584 of the response)" in text


def test_slots_that_nothing_runs_on_are_named():
    assert "idle" not in text_of(f"--nodes 4 {H200} --tp-size 2")
    text = text_of(f"--nodes 2 {H200} --tp-size 2 --engine-tp-size 2 --rollout.engines-per-node 3")
    assert "idle      nothing runs on node 1: GPU 6-7\n" in text


def test_evaluations_and_saves_say_when_and_what_is_kept():
    text = text_of(
        f"--nodes 4 {H200} --tp-size 2 --eval-prompts x.jsonl --eval.interval 20 "
        "--checkpoint.interval 10 --checkpoint.keep-every 50 --checkpoint.keep-best"
    )
    assert "evals     held_out: before the first rollout, after every 20 rollouts and after" in text
    saves = "every 10 rollouts, at the end and at a stop; kept: the last 2, each 50th, the best"
    assert f"saves     {saves}\n" in text


def test_what_differs_from_the_defaults_stands_with_who_has_set_it(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("training: {lr: 2e-6, tp_size: 1}\nrollout: {num_rollout: 7, top_p: 0.9}")
    cluster = tmp_path / "site.yaml"
    cluster.write_text("{gpus_per_node: 8, gpu_memory_gib: 140, partition: h200}")
    flags = ["--nodes", "2", "--num-rollout", "9", "--seed", "0"]
    config = load(recipe, cluster, flags)
    sources = set_by(recipe, cluster, flags)
    text = describe(config, QWEN3_4B, plan(config, QWEN3_4B), (), sources)
    assert text.splitlines()[-3:] == [
        "set by    flags: rollout.num_rollout=9, cluster.nodes=2",
        "          mine.yaml: rollout.top_p=0.9, training.lr=2e-06",
        "          site.yaml: cluster.gpus_per_node=8, cluster.gpu_memory_gib=140, "
        "cluster.partition=h200",
    ]
