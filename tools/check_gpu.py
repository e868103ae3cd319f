"""Shows on a GPU at hand what the tests show on a CPU, in minutes: whether the trainers are
right, how fast they are, and how much memory they take.

    python tools/check_gpu.py [--json FILE] [--only SECTION ...]
    python tools/check_gpu.py --device cpu    the same code on tiny sizes, without a GPU

It needs torch, transformers, megatron-core and what nanoslime's configuration needs; no SGLang,
Ray, Transformer Engine or network. Every section is a process of its own with a deadline, so
that one that fails takes no other with it. The table shows each figure, and beside a limit
whether it is within it. The exit status is 1 where a figure is beyond its limit or a section
failed.
"""

import json
import multiprocessing
import platform
import sys
import tempfile
import time
import traceback
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tools import gpu_checks
from tools.gpu_checks import SECTIONS, Figure, Sizes

PACKAGES = ("torch", "transformers", "megatron-core", "transformer-engine", "flash-attn")
SECTION_DEADLINE_S = 150.0


@dataclass(frozen=True, slots=True)
class Result:
    """What one section gave: figures, or the traceback that ended it."""

    section: str
    seconds: float
    figures: list[Figure]
    error: str | None = None

    @property
    def passed(self) -> bool:
        return self.error is None and all(figure.passed is not False for figure in self.figures)


def run_section(section: str, sizes: Sizes, directory: Path, deadline_s: float) -> Result:
    """Runs a section in a process of its own, which is killed at the deadline."""
    # The fork server imports torch and transformers once for all sections. Some of these imports
    # use CUDA, after which a forked process could not.
    context = multiprocessing.get_context("spawn" if sizes.device == "cuda" else "forkserver")
    if sizes.device == "cpu":
        context.set_forkserver_preload(["tools.gpu_checks", "nanoslime.training.megatron.backend"])
    file = directory / f"{section}.jsonl"
    process = context.Process(target=_work, args=(section, sizes, directory, file))
    begin = time.monotonic()
    process.start()
    process.join(deadline_s)
    late = process.is_alive()
    if late:
        process.kill()
        process.join()
    seconds = time.monotonic() - begin
    lines = file.read_text().splitlines() if file.exists() else []
    figures = [Figure(**json.loads(line)) for line in lines]
    failure = directory / f"{section}.error"
    error = None
    if late:
        error = f"{section} was not done after {deadline_s:g} s"
    elif failure.exists():
        error = failure.read_text()
    elif process.exitcode:
        error = f"the process of {section} ended with exit status {process.exitcode}"
    return Result(section, seconds, figures, error)


def _work(section: str, sizes: Sizes, directory: Path, file: Path) -> None:
    """Writes a line for each figure as it comes, and the traceback of a failure."""
    try:
        with file.open("w") as out:
            for figure in SECTIONS[section](sizes, directory):
                out.write(json.dumps(asdict(figure)) + "\n")
                out.flush()
    except Exception:
        (directory / f"{section}.error").write_text(traceback.format_exc())


def describe_machine(device: str) -> dict[str, Any]:
    """The device, the versions of the packages, and the date."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "device": gpu_checks.device_name(device),
        "python": platform.python_version(),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }


def heading(machine: dict[str, Any]) -> str:
    """One line on the machine, and the head of the table."""
    installed = [f"{name} {number}" for name, number in machine["versions"].items() if number]
    lines = [
        f"{machine['device']}, Python {machine['python']}, {', '.join(installed)}",
        "",
        "| section | figure | value | limit | |",
        "|---|---|---|---|---|",
    ]
    return "\n".join(lines)


def rows(result: Result) -> list[str]:
    """The rows of the Markdown table for one section."""
    words = {None: "", True: "ok", False: "FAILED"}
    found = []
    for figure in result.figures:
        limit = "" if figure.limit is None else f"{figure.limit:.3g}"
        value = f"{figure.value:,.4g} {figure.unit}".strip()
        word = words[figure.passed]
        found.append(f"| {result.section} | {figure.name} | {value} | {limit} | {word} |")
    if result.error is not None:
        last_line = result.error.strip().splitlines()[-1]
        found.append(f"| {result.section} | {last_line} | | | FAILED |")
    return found


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument(
        "--deadline-s",
        type=float,
        default=SECTION_DEADLINE_S,
        help="of one section (%(default)g)",
    )
    return parser


def main(argv: list[str]) -> int:
    options = make_parser().parse_args(argv)
    if options.device == "cuda" and not gpu_checks.sees_gpu():
        print("check_gpu: torch sees no GPU; --device cpu runs the same code on tiny sizes")
        return 1
    sizes = gpu_checks.FULL if options.device == "cuda" else gpu_checks.SMALL
    machine = describe_machine(options.device)
    print(heading(machine), flush=True)
    results = []
    with tempfile.TemporaryDirectory(prefix="check_gpu-") as directory:
        for section in options.only:
            result = run_section(section, sizes, Path(directory), options.deadline_s)
            results.append(result)
            print(*rows(result), sep="\n", flush=True)
            print(f"| {section} | all | {result.seconds:.0f} s | | |", flush=True)
            if result.error is not None:
                print(result.error, file=sys.stderr, flush=True)
    if options.json:
        content = {"machine": machine, "results": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(content, indent=2))
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
