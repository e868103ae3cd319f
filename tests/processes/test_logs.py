"""What a log holds, and its last lines as messages quote them."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanoslime.config.load import load
from nanoslime.processes.logs import last_line, last_lines, logged_to, set_level


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


@pytest.fixture
def levels() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("", "nanoslime", "jobs")]
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


@pytest.mark.parametrize(
    ("name", "ours", "of_libraries"),
    [("debug", logging.DEBUG, logging.INFO), ("error", logging.ERROR, logging.ERROR)],
)
def test_debug_is_for_our_own_messages(
    levels: None, name: str, ours: int, of_libraries: int
) -> None:
    set_level(name)
    assert logging.getLogger("nanoslime.rollout.router").getEffectiveLevel() == ours
    assert logging.getLogger("jobs.agent").getEffectiveLevel() == ours
    assert logging.getLogger("a.library").getEffectiveLevel() == of_libraries


def test_the_level_of_a_run_is_a_flag() -> None:
    assert load(None, None, ["--log-level", "debug"]).log_level == "debug"


def test_a_log_gets_what_is_logged_inside_and_nothing_after(tmp_path: Path) -> None:
    logger = logging.getLogger("nanoslime.test")
    with logged_to(tmp_path / "driver-0.log"):
        logger.error("inside")
    logger.error("after")
    assert "ERROR nanoslime.test: inside" in (tmp_path / "driver-0.log").read_text()
    assert "after" not in (tmp_path / "driver-0.log").read_text()
