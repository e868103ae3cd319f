"""What the conversion commands share: arguments, the printed plan, progress and the final
line.
"""

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
from tools.conversion.plan import ConversionPlan
from tools.conversion.run import Options, check_output, run
from tools.conversion.tensor_copy import Fill, Progress

_BAR = "tqdm:tqdm"  # is imported only where a person watches


def make_parser(doc: str | None, command: str, source: str) -> ArgumentParser:
    """The arguments of every conversion; `source` is how the help calls the directory
    that is read.
    """
    parser = ArgumentParser(
        command,
        description=doc,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", type=Path, metavar=source)
    parser.add_argument("out", type=Path, metavar="OUT", help="a directory that does not exist yet")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan and the bytes; write nothing"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace OUT, once the new one is complete"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=min(8, 2 * (os.cpu_count() or 1)),
        help="files written at a time (%(default)s)",
    )
    parser.add_argument(
        "--no-checksums",
        action="store_true",
        help="neither compare the source's manifest nor write one",
    )
    return parser


def convert(
    arguments: Namespace,
    make_plan: Callable[[Checkpoint], ConversionPlan],
    metadata_dir: Path | None = None,
) -> None:
    """The whole command, from the checkpoint to the last line.

    `metadata_dir` holds the configuration of the checkpoint, if it is not beside it.
    """
    started = time.monotonic()
    checksums = not arguments.no_checksums
    verify = checksums and not arguments.dry_run
    plan = make_plan(open_checkpoint(arguments.source, metadata_dir, verify=verify))
    if arguments.dry_run:
        check_output(plan, arguments.out, arguments.force)
        print(describe(plan, arguments.out))
        return
    for note in [*notes(plan.source), *_left_out(plan)]:
        print(note, file=sys.stderr)
    options = Options(arguments.force, max(1, arguments.threads), checksums)
    with progress_bar(plan.num_bytes) as progress:
        run(plan, arguments.out, options, progress)
    print(f"{arguments.out}: {summary(plan.num_bytes, time.monotonic() - started)}")


@contextmanager
def progress_bar(num_bytes: int) -> Iterator[Progress]:
    """A function that takes the bytes done; where a person watches, it moves a bar."""
    if not sys.stderr.isatty():
        yield _ignore
        return
    make_bar = resolve(_BAR, {}, "bar")
    with make_bar(total=num_bytes, unit="B", unit_scale=True) as bar:
        yield bar.update


def _ignore(num_bytes: int) -> None:
    pass


def summary(num_bytes: int, seconds: float) -> str:
    """Size, time, rate and the largest resident memory of this process."""
    gigabytes = num_bytes / 1e9
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return (
        f"{gigabytes:.3f} GB in {seconds:.2f} s, {gigabytes / seconds:.2f} GB/s, "
        f"peak memory {peak_mb:.0f} MB"
    )


def describe(plan: ConversionPlan, out: Path) -> str:
    """The plan as a table: the model, what is read, and what is written file by file."""
    source = plan.source
    whole_row_bytes = 0
    block_bytes = 0
    for file in plan.files:
        for item in file.content:
            if not isinstance(item, Fill):
                continue
            if item.ranges() is None:
                block_bytes += item.num_bytes
            else:
                whole_row_bytes += item.num_bytes
    lines = [
        f"model    {_describe_model(source)}",
        f"read     {source.path} ({source.format})",
        f"         {len(source.tensors)} tensors, {source.num_bytes:,} bytes",
        f"write    {out} ({len(plan.files)} files, {plan.num_bytes:,} bytes)",
        f"         {whole_row_bytes:,} bytes move as whole rows, {block_bytes:,} block by block",
    ]
    for file in plan.files:
        lines.append(f"         {file.name}  {file.num_bytes:,}")
    return "\n".join([*lines, *notes(source), *_left_out(plan)])


def _describe_model(source: Checkpoint) -> str:
    shape = source.shape
    text = f"{shape.model_type}, {shape.num_parameters:,} parameters, {shape.num_layers} layers"
    if shape.moe:
        text += f", {shape.moe.num_experts} experts"
    if source.mtp:
        text += f", {shape.num_mtp_layers} for multi-token prediction"
    return text


def _left_out(plan: ConversionPlan) -> list[str]:
    if not plan.left_out:
        return []
    return [
        f"note: {len(plan.left_out)} tensors of the original are left out, for example "
        f"{plan.left_out[0]}: no trainer holds them, and a model loads without them"
    ]


def notes(source: Checkpoint) -> list[str]:
    """What a user should know about the source before trusting the result."""
    found = []
    if source.manifest_dir is None:
        found.append(
            f"note: {source.path} has no manifest: its structure is checked, its bits are not"
        )
    unconfirmed = source.shape.architecture.unconfirmed
    if unconfirmed:
        found.append(f"note: {source.shape.model_type}: {unconfirmed}")
    return found


def finish(command: str, main: Callable[[], int]) -> int:
    """The exit code of `main`.

    It is 2, with one line on stderr, for what `main` refuses, and 1 for an error of the system.
    """
    try:
        return main()
    except RunError as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{command}: {error}; the same command continues", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{command}: interrupted; the same command continues", file=sys.stderr)
        return 130
