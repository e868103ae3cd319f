"""The last lines of logs, for messages that say why a process ended."""

from pathlib import Path

_TAIL_BYTES = 8192
_MAX_LINE_CHARS = 300


def last_lines(log: Path, count: int) -> list[str]:
    """The last `count` lines of the log's last 8 KiB that are not blank; OSError where there is no log."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-count:]


def last_line(log: Path) -> str:
    """The last line that is not blank, at most 300 characters; a word in brackets where there is none."""
    try:
        lines = last_lines(log, 1)
    except OSError as error:
        return f"(no log: {error})"
    if not lines:
        return "(empty)"
    return lines[0][:_MAX_LINE_CHARS]
