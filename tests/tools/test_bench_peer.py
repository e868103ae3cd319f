"""The benchmark beside TRL, on tiny sizes: a way of its own runs, and the table has its figures."""

import json
import sys

import pytest

from tools.bench_peer import main


@pytest.fixture
def bench(monkeypatch, capfd):
    """Calls main() with these arguments and returns the lines of its table."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["bench_peer.py", *arguments])
        main()
        return capfd.readouterr().out.splitlines()

    return run


def test_fsdp_with_the_embedded_engine_is_measured_step_by_step(bench, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"question": f"How many are {i} apples and {i + 7} pears?"} for i in range(20)]
    prompts.write_text("\n".join(json.dumps(row) for row in rows))
    way = ("--ways", "fsdp+embedded", "--small", "--steps", "3")
    header, rule, row = bench("--prompts", str(prompts), *way)
    assert header.count("|") == rule.count("|") == row.count("|")
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    name, generate, _, train, _, each_generate, each_train = cells
    assert name == "fsdp+embedded"
    for median, each in ((generate, each_generate), (train, each_train)):
        seconds = [float(second) for second in each.split()]
        assert len(seconds) == 2  # the first step is left out
        assert min(seconds) <= float(median) <= max(seconds)
        assert float(median) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompts", "train.jsonl", "--steps", "1"), "--steps 1 leaves no step after the first"),
        (("--ways", "trl"), "--prompts names no file"),
    ],
    ids=["one step", "no prompts"],
)
def test_what_cannot_be_measured_is_refused(bench, capfd, arguments, message):
    with pytest.raises(SystemExit):
        bench(*arguments)
    assert message in capfd.readouterr().err
