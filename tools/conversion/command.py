"""What the conversion commands share: arguments, the printed plan, progress and the final line."""

import os
import resource
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nanoslime.plugins import resolve
from nanoslime.types import RunError
from tools.conversion.checkpoint import Checkpoint, open_checkpoint
from tools.conversion.plan import Plan
from tools.conversion.run import check_output, run
from tools.conversion.tensor_copy import Fill, Progress


def parser(doc: str | None, name: str, source: str) -> ArgumentParser:
    kind = RawDescriptionHelpFormatter
    made = ArgumentParser(name, description=doc, formatter_class=kind, allow_abbrev=False)
    add, threads = made.add_argument, min(8, 2 * (os.cpu_count() or 1))
    add("source", type=Path, metavar=source)
    add("out", type=Path, metavar="OUT", help="a directory that does not exist yet")
    add("--dry-run", action="store_true", help="print the plan and the bytes; write nothing")
    add("--force", action="store_true", help="replace OUT, once the new one is complete")
    add("--threads", type=int, default=threads, help="files written at a time (%(default)s)")
    add(
        "--no-checksums",
        action="store_true",
        help="neither compare the source's manifest nor write one",
    )
    return made


def convert(
    arguments: Namespace, plan_of: Callable[[Checkpoint], Plan], side: Path | None = None
) -> None:
    """From the checkpoint, with its configuration in `side` if not beside it, to the last line."""
    started, checksums = time.monotonic(), not arguments.no_checksums
    verify = checksums and not arguments.dry_run
    plan = plan_of(open_checkpoint(arguments.source, side, verify=verify))
    if arguments.dry_run:
        check_output(plan, arguments.out, arguments.force)
        print(describe(plan, arguments.out))
        return
    for line in notes(plan.source):
        print(line, file=sys.stderr)
    threads = max(1, arguments.threads)
    with bar(plan.num_bytes) as progress:
        run(
            plan,
            arguments.out,
            arguments.force,
            threads=threads,
            checksums=checksums,
            progress=progress,
        )
    print(f"{arguments.out}: {summary(plan.num_bytes, time.monotonic() - started)}")


@contextmanager
def bar(num_bytes: int) -> Iterator[Progress]:
    """A function that takes bytes done; where a person watches, it moves a bar with bytes and rate."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    with resolve("tqdm:tqdm", {}, "bar")(total=num_bytes, unit="B", unit_scale=True) as shown:
        yield shown.update


def summary(num_bytes: int, seconds: float) -> str:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rate = num_bytes / 1e9 / seconds
    return (
        f"{num_bytes / 1e9:.3f} GB in {seconds:.2f} s, {rate:.2f} GB/s, peak memory {peak:.0f} MB"
    )


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
        found.append(
            f"note: {source.path} has no manifest: its structure is checked, its bits are not"
        )
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
