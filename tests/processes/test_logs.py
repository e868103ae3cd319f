"""The last lines of a log, as messages quote them."""

from pathlib import Path

import pytest

from nanoslime.processes.logs import last_line, last_lines


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"first\nsecond\n", "second"),
        (b"first\nsecond  \n\n   \n", "second"),
        (b"progress 1\rprogress 2", "progress 2"),
        (b"broken \xff here", "broken \ufffd here"),
        (b"x" * 20_000, "x" * 300),
        (b"", "(empty)"),
        (b"\n \n", "(empty)"),
    ],
)
def test_the_last_line_that_is_not_blank(tmp_path: Path, content: bytes, line: str) -> None:
    log = tmp_path / "log"
    log.write_bytes(content)
    assert last_line(log) == line


def test_a_missing_log_is_said(tmp_path: Path) -> None:
    assert last_line(tmp_path / "none").startswith("(no log: ")


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("".join(f"line {i}\n" for i in range(100_000)))
    assert last_lines(log, 2) == ["line 99998", "line 99999"]
