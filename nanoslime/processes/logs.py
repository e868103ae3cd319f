"""What a process logs, and the last lines of logs, for messages that say why one ended."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_TAIL_BYTES = 8192
_MAX_LINE_CHARS = 300


def set_level(name: str) -> None:
    """Sets the level of this process's log: `name` as in `RunConfig.log_level`.

    Debug is for our own messages: those of libraries would bury them.
    """
    level = logging.getLevelNamesMapping()[name.upper()]
    logging.getLogger().setLevel(max(level, logging.INFO))
    for package in ("nanoslime", "jobs"):
        logging.getLogger(package).setLevel(level)


@contextmanager
def logged_to(log: Path | None) -> Iterator[None]:
    """What this process logs inside also goes into `log`; None: it has its log already."""
    if log is None:
        yield
        return
    handler = logging.FileHandler(log)
    handler.setFormatter(logging.Formatter(FORMAT))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


def last_lines(log: Path, count: int) -> list[str]:
    """The last lines that are not blank, at most `count`, of the log's last 8 KiB.

    Raises OSError where there is no log.
    """
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-count:]


def last_line(log: Path) -> str:
    """The first 300 characters of the last line that is not blank.

    Where there is none, it says so in brackets.
    """
    try:
        lines = last_lines(log, 1)
    except OSError as error:
        return f"(no log: {error})"
    if not lines:
        return "(empty)"
    return lines[0][:_MAX_LINE_CHARS]
