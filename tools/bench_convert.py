"""Time and memory of the conversions beside `cp` and `sync` of the same files.

    python tools/bench_convert.py [--sizes 1 4] [--memory-sizes 0.25] [--rounds 5] [--dir DIR]

Makes random Llama models, then per round and in turn: cp + sync of the source's files, conversion, conversion
without checksums; both ways. Every run is a process of its own, start included, until its output is on disk.
"""

import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ProcessPoolExecutor
from math import prod
from pathlib import Path
from typing import NamedTuple

from nanoslime.models.rules import tensors
from nanoslime.models.shape import ModelShape
from nanoslime.storage.safetensors_file import write_files

TOOLS = Path(__file__).parent
_LAYER_BYTES, _ENDS_BYTES = 90_185_728, 262_148_096  # of the model below, in bfloat16


class Run(NamedTuple):
    seconds: float
    peak_mb: float


def make_model(directory: Path, gigabytes: float) -> int:
    """A random Llama of about that size in bfloat16, in files of a quarter of it; returns its bytes."""
    layers = max(1, round((gigabytes * 1e9 - _ENDS_BYTES) / _LAYER_BYTES))
    config = dict(
        model_type="llama",
        hidden_size=2048,
        intermediate_size=5632,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        num_hidden_layers=layers,
        vocab_size=32000,
        rms_norm_eps=1e-5,
        tie_word_embeddings=gigabytes < 0.5,
        max_position_embeddings=4096,
        rope_theta=1e4,
        hidden_act="silu",
    )
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    shapes = tensors(ModelShape.from_config(config))
    specs = [(name, "BF16", shape) for name, shape in sorted(shapes.items())]
    random_bytes = ((name, os.urandom(2 * prod(shape))) for name, _, shape in specs)
    write_files(directory, specs, random_bytes, int(gigabytes * 0.25e9))
    return sum(2 * prod(shape) for _, _, shape in specs)


def timed(*commands: list[str]) -> Run:
    """Seconds of the commands, one after the other, and the largest resident memory of one."""
    started, peak = time.monotonic(), 0.0
    for command in commands:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        told = child.stderr.read() if child.stderr else b""
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(f"{' '.join(command)} failed: {told.decode()}")
        peak = max(peak, used.ru_maxrss / 1024)
    return Run(time.monotonic() - started, peak)


def copy(source: Path, target: Path) -> Run:
    files = [str(target / path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
    return timed(["cp", "-r", "--reflink=never", str(source), str(target)], ["sync", *files])


def convert(command: str, source: Path, target: Path) -> Run:
    tool, *options = command.split()
    return timed([sys.executable, str(TOOLS / f"{tool}.py"), str(source), str(target), *options])


def one_size(work: Path, gigabytes: float, rounds: int) -> dict[str, list[Run]]:
    """The runs of every kind, `rounds` of each, in an order that changes from round to round."""
    hf, megatron, out = work / "hf", work / "megatron", work / "out"
    with ProcessPoolExecutor(1) as pool:  # a child begins with the memory of its parent
        size = pool.submit(make_model, hf, gigabytes).result()
    convert("hf_to_megatron", hf, megatron)
    sources = {
        "cp + sync of the Hugging Face files": hf,
        "hf_to_megatron": hf,
        "hf_to_megatron --no-checksums": hf,
        "cp + sync of the Megatron files": megatron,
        "megatron_to_hf": megatron,
        "megatron_to_hf --no-checksums": megatron,
    }
    runs: dict[str, list[Run]] = {kind: [] for kind in sources}
    for number in range(rounds):
        order = list(sources)
        random.Random(number).shuffle(order)
        for kind in order:
            subprocess.run(
                ["sync"], check=True
            )  # what earlier runs left to be written is not this one's
            source = sources[kind]
            runs[kind].append(
                copy(source, out) if kind.startswith("cp") else convert(kind, source, out)
            )
            shutil.rmtree(out)
    print(f"\n{size / 1e9:.3f} GB, {rounds} rounds\n")
    print(
        "| | median s | least s | of cp + sync: median | least | peak MB |\n|---|---|---|---|---|---|"
    )
    for kind, done in runs.items():
        base = next(
            runs[first] for first in sources if sources[first] == sources[kind]
        )  # cp + sync
        median, least = (pick([run.seconds for run in done]) for pick in (statistics.median, min))
        of_median = median / statistics.median(run.seconds for run in base)
        of_least = least / min(run.seconds for run in base)
        peak = max(run.peak_mb for run in done)
        print(
            f"| {kind} | {median:.2f} | {least:.2f} | {of_median:.2f} | {of_least:.2f} | {peak:.0f} |"
        )
    return runs


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", type=float, nargs="*", default=[1.0, 4.0], help="GB, timed (%(default)s)"
    )
    parser.add_argument(
        "--memory-sizes", type=float, nargs="*", default=[0.25], help="GB, memory only"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--dir", type=Path, help="where to work: needs three times the largest size"
    )
    arguments = parser.parse_args(argv)
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", end="")
    peaks: dict[float, float] = {}
    timed_sizes = [(size, arguments.rounds) for size in arguments.sizes]
    for size, rounds in timed_sizes + [(size, 1) for size in arguments.memory_sizes]:
        with tempfile.TemporaryDirectory(dir=arguments.dir) as work:
            runs = one_size(Path(work), size, rounds)
        peaks[size] = max(
            run.peak_mb for kind, done in runs.items() if "cp" not in kind for run in done
        )
    print(
        "\npeak memory: "
        + ", ".join(f"{size:g} GB {peak:.0f} MB" for size, peak in sorted(peaks.items()))
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
