"""What the conversion commands share: arguments, the printed plan, progress and the final line."""

import argparse
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nanoslime.plugins import resolve
from nanoslime.types import RunError
from tools.conversion.checkpoint import Checkpoint
from tools.conversion.plan import Plan
from tools.conversion.run import check_output, run
from tools.conversion.tensor_copy import Fill


def parser(doc: str | None, name: str, source: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog=name, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("source", type=Path, metavar=source)
    made.add_argument("out", type=Path, metavar="OUT", help="a directory that does not exist yet")
    made.add_argument("--dry-run", action="store_true", help="print the plan and the bytes; write nothing")
    made.add_argument("--force", action="store_true", help="replace OUT, once the new one is complete")
    made.add_argument(
        "--threads",
        type=int,
        default=min(8, 2 * (os.cpu_count() or 1)),
        help="files written at a time (%(default)s)",
    )
    made.add_argument(
        "--no-checksums", action="store_true", help="neither compare the source's manifest nor write one"
    )
    return made


def convert(arguments: argparse.Namespace, make: Callable[[], Plan]) -> None:
    """From the plan to the last line."""
    started = time.monotonic()
    plan = make()
    if arguments.dry_run:
        check_output(plan, arguments.out, arguments.force)
        print(describe(plan, arguments.out))
        return
    for line in notes(plan.source):
        print(line, file=sys.stderr)
    with bar(plan.num_bytes) as progress:
        run(
            plan,
            arguments.out,
            force=arguments.force,
            threads=max(1, arguments.threads),
            checksums=not arguments.no_checksums,
            progress=progress,
        )
    print(f"{arguments.out}: {summary(plan.num_bytes, time.monotonic() - started)}")


@contextmanager
def bar(num_bytes: int) -> Iterator[Callable[[int], object]]:
    """A function that takes bytes done; where a person watches, it moves a bar with bytes and rate."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    with resolve("tqdm:tqdm", {}, "bar")(total=num_bytes, unit="B", unit_scale=True) as shown:
        yield shown.update


def summary(num_bytes: int, seconds: float) -> str:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rate = num_bytes / 1e9 / seconds
    return f"{num_bytes / 1e9:.3f} GB in {seconds:.2f} s, {rate:.2f} GB/s, peak memory {peak:.0f} MB"


def describe(plan: Plan, out: Path) -> str:
    """The plan as a table: the model, what is read and written, file by file."""
    source, shape = plan.source, plan.source.shape
    fills = [item for file in plan.files for item in file.content if isinstance(item, Fill)]
    rows = sum(item.num_bytes for item in fills if item.ranges() is not None)
    total = sum(item.num_bytes for item in fills)
    lines = [
        f"model    {shape.model_type}, {shape.num_parameters:,} parameters, {shape.num_layers} layers"
        + (f", {shape.moe.num_experts} experts" if shape.moe else "")
        + (f", {shape.num_mtp_layers} for multi-token prediction" if source.mtp else ""),
        f"read     {source.path} ({source.format})",
        f"         {len(source.tensors)} tensors, {source.num_bytes:,} bytes",
        f"write    {out} ({len(plan.files)} files, {plan.num_bytes:,} bytes)",
        f"         {rows:,} bytes move as whole rows, {total - rows:,} block by block",
    ]
    lines += [f"         {file.name}  {file.num_bytes:,}" for file in plan.files]
    return "\n".join(lines + notes(source))


def notes(source: Checkpoint) -> list[str]:
    """What a user should know about the source before trusting the result."""
    found = []
    if source.manifest is None:
        found.append(f"note: {source.path} has no manifest: its structure is checked, its bits are not")
    if why := source.shape.architecture.unconfirmed:
        found.append(f"note: {source.shape.model_type}: {why}")
    return found


def finish(name: str, main: Callable[[], int]) -> int:
    """The exit code of `main`; with one line, 2 for what it refuses and 1 for what the system does."""
    try:
        return main()
    except RunError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{name}: {error}; the same command continues", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command continues", file=sys.stderr)
        return 130
