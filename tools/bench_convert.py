"""Time and memory of the conversions beside `cp` and `sync` of the same files.

    python tools/bench_convert.py [--sizes 1 4] [--memory-sizes 0.25] [--rounds 5] [--dir DIR]

It makes random Llama models, then runs in every round, in turn and in both directions: cp
+ sync of the source's files, a conversion, and a conversion without checksums. Every run
is a process of its own, its start included, until its output is on disk.
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
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from nanoslime.models.rules import tensors
from nanoslime.models.shape import ModelShape
from nanoslime.storage.safetensors_file import Spec
from tools.conversion.stream import write_files

TOOLS = Path(__file__).parent
# Bytes of the model below in bfloat16: of a layer, and of embedding, output layer and
# final norm.
_LAYER_BYTES = 90_185_728
_ENDS_BYTES = 262_148_096
_MODEL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "rope_theta": 1e4,
    "hidden_act": "silu",
}


@dataclass(frozen=True, slots=True)
class Run:
    seconds: float
    peak_mb: float


@dataclass(slots=True)
class Kind:
    """What is timed: a copy of `source` (no tool), or a tool with options that reads
    `source`.
    """

    name: str
    source: Path
    tool: str | None = None
    options: tuple[str, ...] = ()
    runs: list[Run] = field(default_factory=list)

    def run(self, out: Path) -> None:
        if self.tool is None:
            self.runs.append(copy(self.source, out))
        else:
            self.runs.append(convert(self.tool, self.source, out, *self.options))

    def median_s(self) -> float:
        return statistics.median(run.seconds for run in self.runs)

    def least_s(self) -> float:
        return min(run.seconds for run in self.runs)

    def peak_mb(self) -> float:
        return max(run.peak_mb for run in self.runs)


def make_model(directory: Path, gigabytes: float) -> int:
    """A random Llama of about this size in bfloat16, in files of a quarter of it; returns
    its bytes.
    """
    num_layers = max(1, round((gigabytes * 1e9 - _ENDS_BYTES) / _LAYER_BYTES))
    config = {
        **_MODEL,
        "num_hidden_layers": num_layers,
        "tie_word_embeddings": gigabytes < 0.5,
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    shapes = tensors(ModelShape.from_config(config))
    specs = [(name, "BF16", shape) for name, shape in sorted(shapes.items())]
    write_files(directory, specs, _random_tensors(specs), int(gigabytes * 0.25e9))
    return sum(2 * prod(shape) for _, _, shape in specs)


def _random_tensors(specs: list[Spec]) -> Iterator[tuple[str, bytes]]:
    for name, _, shape in specs:
        yield name, os.urandom(2 * prod(shape))


def timed(*commands: list[str]) -> Run:
    """Seconds of the commands, one after the other, and the largest resident memory of one."""
    started = time.monotonic()
    peak_mb = 0.0
    for command in commands:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        errors = child.stderr.read() if child.stderr else b""
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(f"{' '.join(command)} failed: {errors.decode()}")
        peak_mb = max(peak_mb, usage.ru_maxrss / 1024)
    return Run(time.monotonic() - started, peak_mb)


def copy(source: Path, target: Path) -> Run:
    """cp of a directory, and sync of the copied files."""
    files = []
    for path in source.rglob("*"):
        if path.is_file():
            files.append(str(target / path.relative_to(source)))
    return timed(["cp", "-r", "--reflink=never", str(source), str(target)], ["sync", *files])


def convert(tool: str, source: Path, target: Path, *options: str) -> Run:
    return timed([sys.executable, str(TOOLS / f"{tool}.py"), str(source), str(target), *options])


def one_size(work: Path, gigabytes: float, rounds: int) -> list[Kind]:
    """Times every kind `rounds` times, in an order that changes from round to round."""
    hf = work / "hf"
    megatron = work / "megatron"
    out = work / "out"
    with ProcessPoolExecutor(1) as pool:  # a child begins with the memory of its parent
        num_bytes = pool.submit(make_model, hf, gigabytes).result()
    convert("hf_to_megatron", hf, megatron)
    kinds = [
        Kind("cp + sync of the Hugging Face files", hf),
        Kind("hf_to_megatron", hf, "hf_to_megatron"),
        Kind("hf_to_megatron --no-checksums", hf, "hf_to_megatron", ("--no-checksums",)),
        Kind("cp + sync of the Megatron files", megatron),
        Kind("megatron_to_hf", megatron, "megatron_to_hf"),
        Kind("megatron_to_hf --no-checksums", megatron, "megatron_to_hf", ("--no-checksums",)),
    ]
    for number in range(rounds):
        order = list(kinds)
        random.Random(number).shuffle(order)
        for kind in order:
            # What earlier runs left to be written does not count for this one.
            subprocess.run(["sync"], check=True)
            kind.run(out)
            shutil.rmtree(out)
    print(f"\n{num_bytes / 1e9:.3f} GB, {rounds} rounds\n")
    print_table(kinds)
    return kinds


def print_table(kinds: list[Kind]) -> None:
    print("| | median s | least s | of cp + sync: median | least | peak MB |")
    print("|---|---|---|---|---|---|")
    copies = {kind.source: kind for kind in kinds if kind.tool is None}
    for kind in kinds:
        base = copies[kind.source]
        of_median = kind.median_s() / base.median_s()
        of_least = kind.least_s() / base.least_s()
        times = f"{kind.median_s():.2f} | {kind.least_s():.2f}"
        print(
            f"| {kind.name} | {times} | {of_median:.2f} | {of_least:.2f} | {kind.peak_mb():.0f} |"
        )


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
    load = os.getloadavg()[0]
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f}", end="")
    rounds_of_size = [(size, arguments.rounds) for size in arguments.sizes]
    rounds_of_size += [(size, 1) for size in arguments.memory_sizes]
    peaks: dict[float, float] = {}
    for size, rounds in rounds_of_size:
        with tempfile.TemporaryDirectory(dir=arguments.dir) as work:
            kinds = one_size(Path(work), size, rounds)
        peaks[size] = max(kind.peak_mb() for kind in kinds if kind.tool is not None)
    texts = [f"{size:g} GB {peak:.0f} MB" for size, peak in sorted(peaks.items())]
    print("\npeak memory: " + ", ".join(texts))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
