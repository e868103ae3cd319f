"""Which share of the bfloat16 weights changes from one version to the next, in a real run.

    python tools/bench_weight_changes.py [--rollouts 50] [--lr 6e-4 1e-6] [FLAG ...]
    python tools/bench_weight_changes.py --versions DIR

The first form makes one run of the mock recipe for each learning rate, `python -m
nanoslime.train --mock --dtype bfloat16`, whose engine keeps a copy of every version that is
sent to it. Further flags go to all runs. The second form reads versions that are there: DIR
holds directories of safetensors whose names end with a number, such as version_7 or step_7.

An element has changed where its bits have. Of each kind of tensors the table shows the share
of changed elements, as the median and the range over the steps, and how large the weights are:
the smaller, the finer are the steps of bfloat16, and the more of them change. A delta of
(4-byte index, 2-byte value) pairs has 3 x the share of the bytes of all weights.
"""

import re
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanoslime.engine_kind import EngineStart
from nanoslime.rollout.engines.embedded import Embedded
from nanoslime.rollout.engines.embedded_model import EmbeddedEngine
from nanoslime.weight_sync.transport import version_dir

# The first pattern that a tensor's name has says what kind it is.
KINDS = {
    "norm": "norm",
    "embedding": "embed_tokens",
    "output layer": "lm_head",
    "attention": "attn",
    "mlp": "mlp",
}
ALL = "all"
Shares = dict[str, float]  # of changed elements, by kind


class RecordingEngine(EmbeddedEngine):
    """Keeps every version that it gets in a directory of its own."""

    def __init__(self, start: EngineStart) -> None:
        config = start.config
        super().__init__(str(start.model_dir), config.model.dtype, start.device, seed=config.seed)
        self._directory = sent_dir(start.log.parent)

    def load_weights(self, named: Iterable[tuple[str, Tensor]], version: int) -> None:
        tensors = dict(named)
        path = version_dir(self._directory, version)
        path.mkdir(parents=True)
        save_file(tensors, path / "model.safetensors")
        super().load_weights(tensors.items(), version)


class RecordingOwner:
    def __init__(self, start: EngineStart) -> None:
        self._engine = RecordingEngine(start)

    def start(self, deadline_s: float) -> EmbeddedEngine:
        return self._engine

    def close(self) -> None:
        self._engine.close()


class Recording(Embedded):
    """The embedded engine, which keeps what it gets."""

    owner = "tools.bench_weight_changes:RecordingOwner"


def sent_dir(logs: Path) -> Path:
    return logs / "sent"


def train(lr: float, rollouts: int, run_root: Path, more: list[str]) -> Path:
    """Makes a run; returns the directory of the versions that its engine got."""
    name = f"lr-{lr:g}"
    command = [sys.executable, "-m", "nanoslime.train", "--mock", "--dtype", "bfloat16"]
    command += ["--num-rollout", str(rollouts), "--lr", str(lr)]
    command += ["--engine", f"tools.bench_weight_changes:{Recording.__name__}"]
    command += ["--run-root", str(run_root), "--name", name, *more]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    [found] = (run_root / name).glob("attempts/1/**/sent")
    return found


def versions(directory: Path) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The versions in a directory, in their order, as bfloat16."""
    numbered = {}
    for path in directory.iterdir():
        number = re.search(r"_(\d+)$", path.name)
        if number and path.is_dir():
            numbered[int(number[1])] = path
    for number, path in sorted(numbered.items()):
        tensors: dict[str, Tensor] = {}
        for file in sorted(path.glob("*.safetensors")):
            for name, tensor in load_file(file).items():
                tensors[name] = tensor.bfloat16()
        yield number, tensors


def kind_of(name: str) -> str:
    return next((kind for kind, part in KINDS.items() if part in name), "other")


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> Shares:
    """The share of the elements of each kind whose bits differ."""
    num_changed: dict[str, int] = defaultdict(int)
    num_elements: dict[str, int] = defaultdict(int)
    for name, tensor in after.items():
        differs = tensor.view(torch.int16) != before[name].view(torch.int16)
        for kind in (kind_of(name), ALL):
            num_changed[kind] += int(differs.sum())
            num_elements[kind] += tensor.numel()
    return {kind: num_changed[kind] / num for kind, num in num_elements.items()}


def sizes_of(tensors: dict[str, Tensor]) -> dict[str, tuple[int, float]]:
    """How many elements each kind has, and their median magnitude."""
    values: dict[str, list[Tensor]] = defaultdict(list)
    for name, tensor in tensors.items():
        for kind in (kind_of(name), ALL):
            values[kind].append(tensor.float().abs().flatten())
    found = {}
    for kind, of_kind in values.items():
        joined = torch.cat(of_kind)
        found[kind] = (joined.numel(), float(joined.median()))
    return found


def report(title: str, directory: Path, *, by_step: bool) -> None:
    """Prints the table of one run."""
    steps: list[tuple[str, Shares]] = []
    last: tuple[int, dict[str, Tensor]] | None = None
    for number, tensors in versions(directory):
        if last is not None:
            steps.append((f"{last[0]} to {number}", changed(last[1], tensors)))
        last = (number, tensors)
    if last is None or not steps:
        raise SystemExit(f"{directory} holds no two versions, such as version_0 and version_1")
    sizes = sizes_of(last[1])
    kinds = [kind for kind in (*KINDS, "other", ALL) if kind in sizes]
    if by_step:
        print(f"| {title} | {' | '.join(kinds)} |")
        print("|---" * (len(kinds) + 1) + "|")
        for name, shares in steps:
            print(f"| {name} | {' | '.join(f'{shares[kind]:.2%}' for kind in kinds)} |")
        print()
    print(f"{title}, {len(steps)} steps\n")
    print("| tensors | elements | median size | changed: median | least | most |")
    print("|---|---|---|---|---|---|")
    for kind in kinds:
        num_elements, size = sizes[kind]
        of_kind = [shares[kind] for _, shares in steps]
        spread = f"{median(of_kind):.2%} | {min(of_kind):.2%} | {max(of_kind):.2%}"
        print(f"| {kind} | {num_elements:,} | {size:.4f} | {spread} |")
    print(flush=True)


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=50, help="%(default)s")
    parser.add_argument("--lr", type=float, nargs="+", default=[6e-4, 1e-6], help="%(default)s")
    parser.add_argument("--versions", type=Path, help="read these, and make no run")
    parser.add_argument("--by-step", action="store_true", help="print every step, too")
    parser.add_argument("--run-root", type=Path)
    options, more = parser.parse_known_args(argv)
    if options.versions:
        report(str(options.versions), options.versions, by_step=options.by_step)
        return 0
    run_root = options.run_root or Path(tempfile.mkdtemp(prefix="changes-"))
    for lr in options.lr:
        directory = train(lr, options.rollouts, run_root, more)
        report(f"lr {lr:g}", directory, by_step=options.by_step)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
