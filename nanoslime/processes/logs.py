"""The last lines of logs, for messages that say why a process ended."""

from pathlib import Path

_TAIL_BYTES = 8192
_MAX_LINE_CHARS = 300


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
