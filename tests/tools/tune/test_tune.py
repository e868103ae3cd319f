"""The cost model by hand, and the layouts that it finds."""

from dataclasses import replace

import pytest

from nanoslime.models.shape import ModelShape
from nanoslime.types import RunError
from tests.models.published import CONFIGS
from tests.plans import QWEN3_30B_A3B, config_of
from tools.memory.plan import plan
from tools.submit.choose import changes, shortage, with_sizes
from tools.tune.command import _all_sizes, best, main, table
from tools.tune.cost import StepTime, active_parameters, step_time

QWEN3_4B = ModelShape.from_config(CONFIGS["Qwen3-4B"])
JOB = """--nodes 2 --cluster.gpus-per-node 8 --allow-slow --rollout-batch-size 128
    --n-samples-per-prompt 16 --max-new-tokens 2048"""


def time_of(flags: str, shape: ModelShape = QWEN3_4B) -> StepTime:
    config = config_of(f"{JOB} {flags}")
    return step_time(config, shape, plan(config, shape))


def test_a_step_is_generation_and_training_or_the_longer_of_both():
    assert StepTime(10, 5, 1, overlaps=False).step_s == 16
    assert StepTime(10, 5, 1, overlaps=True).step_s == 11
    assert time_of("--max-staleness 1").overlaps


def test_training_takes_its_arithmetic_at_forty_percent_of_the_peak():
    """2,048 samples of 1,536 tokens, 6 FLOPs a parameter and token, on 8 GPUs of 990 TFLOP/s."""
    tokens = 2048 * (1024 + 2048) / 2
    attention = 1 + 1536 / QWEN3_4B.attention_parity_tokens
    arithmetic_s = 6 * QWEN3_4B.num_parameters * tokens * attention / (8 * 990e12 * 0.4)
    sent_s = 6 * QWEN3_4B.num_parameters * 7 / 8 / (450e9 * 0.6)
    assert time_of("").train_s == pytest.approx(arithmetic_s + sent_s)


def test_faster_hardware_takes_less_and_a_longer_pipeline_more():
    assert time_of("--cluster.gpu-memory-gb-s 4800").generate_s < time_of("").generate_s
    assert time_of("--cluster.gpu-tflops 2000").train_s < time_of("").train_s
    assert time_of("--cluster.network-gb-s 100").sync_s == pytest.approx(time_of("").sync_s / 2)
    assert time_of("--pp-size 4").train_s > time_of("--pp-size 2").train_s


def test_a_token_takes_eight_of_128_experts():
    """The name of the model says it: about 3 billion of 30 are active."""
    assert 2.5e9 < active_parameters(QWEN3_30B_A3B) < 3.5e9


def test_the_best_layouts_fit_and_keep_what_is_set():
    config = config_of(f"{JOB} --nodes 4 --engine-tp-size 2")
    found = best(config, QWEN3_4B, {"rollout.engine_tp_size": "flag --engine-tp-size"})
    assert len(found) == 5
    seconds = [timed.step_s for timed, _ in found]
    assert seconds == sorted(seconds)
    for _, sizes in found:
        assert sizes["rollout.engine_tp_size"] == 2
        changed = with_sizes(config, changes(config, sizes))
        assert shortage(changed, QWEN3_4B, plan(changed, QWEN3_4B)) == ""
    text = table(config, found)
    assert len(text.splitlines()) == 10
    assert "This is a model, not a measurement" in text


def test_where_nothing_fits_the_refusal_is_that_of_the_plan():
    huge = replace(QWEN3_4B, num_layers=2000)
    with pytest.raises(RunError, match="weights, gradients and optimizer state take"):
        best(config_of(JOB), huge, {})


def test_a_job_without_gpus_is_refused_in_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--tune", "--nodes", "4", "--local"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "submit_grpo: --tune needs a cluster with GPUs; name one by --cluster\n"


def test_what_is_printed_can_be_typed_and_gives_that_layout():
    """Experts under tensor parallelism need --sequence-parallel; one node has FSDP, as long as
    nothing of Megatron is typed."""
    for flags, shape in ((f"{JOB} --nodes 4", QWEN3_30B_A3B), (f"{JOB} --nodes 1", QWEN3_4B)):
        config = config_of(flags)
        found = best(config, shape, {})
        lines = table(config, found).splitlines()[1:6]
        for (_, sizes), line in zip(found, lines, strict=False):
            words = " ".join(line.split()[4:]).replace("as the job is", "")
            assert config_of(f"{flags} {words}") == with_sizes(config, changes(config, sizes))


def test_the_layouts_of_many_nodes_are_few():
    config = config_of(f"{JOB} --nodes 32")
    assert len(list(_all_sizes(config, QWEN3_30B_A3B))) < 4000
