"""The logs of a run's processes as one: filtered, merged by time, each line with its process.

    attempts/<n>/logs/<role>-<rank>.log -> "<n> <role>-<rank> | line"

A line without a time of its own stands where the line before it in its file does. What comes
before any time in a file has that of the first one, and a file without any stands at its end.
"""

import argparse
import re
import time
from collections.abc import Iterator
from pathlib import Path

from nanoslime.run_dir import RunDir
from nanoslime.types import RunError

_POLL_S = 0.5
_TIME = re.compile(r"\[?(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d(?:[,.]\d+)?)")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--role", help="driver, trainer, worker, sglang, agent, ray, ...")
    parser.add_argument("--rank", help="of the role, from 0 on")
    parser.add_argument("--attempt", type=int, metavar="N", help="default: the last; 0: all")
    parser.add_argument("--grep", default="", metavar="REGEX", help="only lines that match")
    parser.add_argument("--tail", type=int, metavar="N", help="only the last N lines")
    parser.add_argument("--follow", action="store_true", help="go on with what is written")


def show(asked: argparse.Namespace) -> Iterator[str]:
    """The lines that are asked for; with --follow it ends only when it is interrupted."""
    run = RunDir.open(asked.run)
    try:
        pattern = re.compile(asked.grep)
    except re.error as error:
        raise RunError(f"--grep {asked.grep!r} is no regular expression: {error}") from error
    read_up_to: dict[Path, int] = {}
    lines = _new_lines(run, asked, pattern, read_up_to)
    if not read_up_to and not asked.follow:
        raise RunError(f"{run.path} has no logs of this choice in attempts/<n>/logs")
    yield from lines if asked.tail is None else lines[max(0, len(lines) - asked.tail) :]
    while asked.follow:
        time.sleep(_POLL_S)
        yield from _new_lines(run, asked, pattern, read_up_to)


def _new_lines(
    run: RunDir, asked: argparse.Namespace, pattern: re.Pattern[str], read_up_to: dict[Path, int]
) -> list[str]:
    """What the logs hold beyond `read_up_to`, which it moves on. A line that is being written
    waits for its end while the logs are followed.
    """
    latest = run.latest_attempt()
    number = asked.attempt if asked.attempt is not None or latest is None else latest.number
    found: list[tuple[str, str]] = []
    for log in sorted(run.attempts.glob(f"{number or '*'}/logs/{asked.role or '*'}-*.log")):
        _, _, rank = log.stem.rpartition("-")
        if asked.rank not in (None, rank) or not log.parts[-3].isdigit():
            continue
        with log.open("rb") as file:
            file.seek(read_up_to.get(log, 0))
            text = file.read()
            if asked.follow:
                text = text[: text.rfind(b"\n") + 1]
            read_up_to[log] = read_up_to.get(log, 0) + len(text)
        lines = text.decode(errors="replace").splitlines()
        times = [" ".join(match.groups()) if (match := _TIME.match(line)) else "" for line in lines]
        ended = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(log.stat().st_mtime))
        at = next(filter(None, times), ended)
        for line, told in zip(lines, times, strict=True):
            at = told or at
            if pattern.search(line):
                found.append((at, f"{log.parts[-3]} {log.stem} | {line}"))
    return [line for _, line in sorted(found, key=lambda pair: pair[0])]
