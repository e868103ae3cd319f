"""The GPU check on a CPU, with tiny sizes: every section runs, and its limits can be exceeded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nanoslime.models.shape import ModelShape
from nanoslime.models.tiny import tiny_qwen3_config
from tools.check_gpu import Result, rows, run_section
from tools.gpu_checks import QWEN3_06B, SECTIONS, SMALL, Figure, step_flops

ROOT = Path(__file__).parents[2]


def test_every_section_passes_on_a_cpu_with_small_sizes(tmp_path):
    file = tmp_path / "figures.json"
    command = [sys.executable, "tools/check_gpu.py", "--device", "cpu", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(file.read_text())
    assert [result["section"] for result in content["results"]] == list(SECTIONS)
    for result in content["results"]:
        assert result["error"] is None
        assert result["figures"]
    assert "| parity | megatron bfloat16: loss |" in done.stdout


def test_a_section_that_fails_is_reported_with_its_error(tmp_path):
    (tmp_path / "model").write_text("no directory")
    result = run_section("train-fsdp", SMALL, tmp_path, deadline_s=120)
    assert not result.passed
    assert "Error" in result.error.splitlines()[-1]


def test_a_section_that_hangs_ends_at_its_deadline(tmp_path):
    result = run_section("train-fsdp", SMALL, tmp_path, deadline_s=0.1)
    assert result.error == "train-fsdp was not done after 0.1 s"


@pytest.mark.parametrize(
    ("value", "passed"), [(0.05, True), (0.051, False), (float("nan"), False)], ids=str
)
def test_a_figure_beyond_its_limit_fails_and_nan_too(value, passed):
    figure = Figure("loss", value, "", limit=0.05)
    assert figure.passed is passed
    result = Result("parity", 1.0, [figure])
    assert result.passed is passed
    [row] = rows(result)
    assert ("FAILED" in row) is not passed


def test_flops_of_a_step_are_those_of_the_formula_by_hand():
    config = {**tiny_qwen3_config(), **QWEN3_06B, "tie_word_embeddings": True}
    shape = ModelShape.from_config(config)
    matrices = 6 * shape.num_parameters * 3000
    attention = 12 * 28 * 16 * 128 * (1000**2 + 2000**2)
    assert step_flops(shape, [1000, 2000], causal=False) == matrices + attention
    assert step_flops(shape, [1000, 2000], causal=True) == matrices + attention / 2
