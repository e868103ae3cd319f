"""The benchmark of weight sync on tiny sizes: what an engine receives, a figure in each cell."""

import argparse
from pathlib import Path

import pytest

from tools.bench_weight_sync import Bench

pytestmark = pytest.mark.megatron


def cells(lines: str) -> list[list[str]]:
    rows = [line.strip("| \n").split(" | ") for line in lines.splitlines() if line.startswith("|")]
    return rows


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(argparse.Namespace(gb=0.01, rounds=1, bucket_mb=4.0), tmp_path)


def test_an_engine_receives_each_byte_of_the_model_once_from_two_stages(
    bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    bench.wire_row("PP2", 0.01, num_engines=1)
    [row] = cells(capfd.readouterr().out)
    trainers, _, num_buckets, _, bytes_per_engine, *ratios = row
    assert trainers == "PP2"
    assert int(num_buckets) > 2
    # Headers are the rest.
    assert 1 <= float(bytes_per_engine) < 1.001
    assert all(float(ratio) > 0 for ratio in ratios)


def test_ranks_write_files_beside_cp(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    bench.disk_rows(["1 rank"])
    [row] = cells(capfd.readouterr().out)
    assert all(float(figure) > 0 for figure in row[1:])
