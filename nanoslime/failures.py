"""What went wrong in one line, and the whole of it in a log."""

import errno
import logging
import subprocess
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nanoslime.types import MachineFailure, RunError

_MAX_LINE_CHARS = 500
_TRACEBACK = "Traceback (most recent call last):"
# What a filesystem answers that is full, lost, or read-only since it is damaged.
_OF_FILESYSTEMS = {errno.EDQUOT, errno.EIO, errno.ENOSPC, errno.EROFS, errno.ESTALE}


def summary(error: BaseException) -> str:
    """One line for the user: the class of the error and the first telling line of its message.

    The root cause follows where there is one. A RunError is told as it is, without its cause,
    also where another error came up on its way out.
    """
    told: RunError | None = None
    for link in _chain(error):
        # Ray's own error is one too, where that of the task is: with its traceback as message.
        itself = _unwrapped(link)
        if isinstance(itself, RunError):
            told = itself
            if link.__cause__ is not None:
                break
    if told is not None:
        return " ".join(line.strip() for line in str(told).splitlines() if line.strip())
    outer = _unwrapped(error)
    root = _last(outer, lambda link: link.__cause__ and _unwrapped(link.__cause__))
    line = _line(outer)
    cause = _line(root)
    return line if cause == line else f"{line}; cause: {cause}"


def is_of_machine(error: BaseException) -> bool:
    """Whether `error` or what led to it is a failure of a process, a node or a filesystem."""
    links = [_unwrapped(link) for link in _chain(error)]
    errnos = [link.errno for link in links if isinstance(link, OSError)]
    is_lost = any(isinstance(link, MachineFailure) for link in links)
    return is_lost or not _OF_FILESYSTEMS.isdisjoint(errnos)


def append_traceback(log: Path, error: BaseException) -> None:
    """Puts the traceback into `log`, unless it is that of a RunError alone."""
    if isinstance(error, RunError) and len(list(_chain(error))) == 1:
        return
    # The disk may be full, or gone: that must not hide the error itself.
    with suppress(OSError), log.open("a", errors="backslashreplace") as file:
        file.writelines(traceback.format_exception(error))


@contextmanager
def told_in_one_line(logger: logging.Logger, what: str) -> Iterator[None]:
    """An error inside goes with its traceback into this process's log, and on as a RunError.

    A RunError of one line can be pickled; what other packages raise often cannot. Some of it is
    no Exception either: torch's CheckpointException. A failure of a machine stays one.
    """
    try:
        yield
    except BaseException as error:
        logger.exception("failed to %s", what)
        kind = MachineFailure if is_of_machine(error) else RunError
        raise kind(summary(error)) from None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it, as a traceback shows them, the last one first."""

    def origin(link: BaseException) -> BaseException | None:
        context = None if link.__suppress_context__ else link.__context__
        return link.__cause__ or context

    return _path(error, origin)


def _unwrapped(error: BaseException) -> BaseException:
    """The error itself: the first of a group, and what Ray's errors hold as `cause`."""

    def inner(link: BaseException) -> BaseException | None:
        if isinstance(link, BaseExceptionGroup):
            return link.exceptions[0]
        cause = getattr(link, "cause", None)
        return cause if isinstance(cause, BaseException) else None

    return _last(error, inner)


def _path(
    error: BaseException, following: Callable[[BaseException], BaseException | None]
) -> Iterator[BaseException]:
    """The error and all that follow; it ends before one that has been: `raise e from e`."""
    passed: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in passed:
        passed.add(id(link))
        yield link
        link = following(link)


def _last(
    error: BaseException, following: Callable[[BaseException], BaseException | None]
) -> BaseException:
    *_, last = _path(error, following)
    return last


def _line(error: BaseException) -> str:
    try:
        message = str(error)
    except Exception:  # the class is somebody else's
        message = "its message cannot be shown"
    if _TRACEBACK in message:
        return _of_traceback(message)[:_MAX_LINE_CHARS]
    line = f"{type(error).__name__}: {_first_line(message)}".removesuffix(": ")
    if isinstance(error, subprocess.CalledProcessError) and error.stderr:
        output = error.stderr
        text = output.decode(errors="replace") if isinstance(output, bytes) else output
        line = f"{line} {_first_line(text)}"
    return line[:_MAX_LINE_CHARS]


def _first_line(text: str) -> str:
    """The first line that holds a letter or a digit, and is no ruler.

    A line that only announces what follows, as torch's "Error(s) in loading state_dict for X:",
    comes with the next one.
    """
    told = ""
    for line in text.splitlines():
        if any(character.isalnum() for character in line):
            told = f"{told} {line.strip()}".lstrip()
            if not told.endswith(":"):
                break
    return told


def _of_traceback(message: str) -> str:
    """The line after the frames of the first traceback in a message: of the root cause.

    Errors of other processes (of torch's and multiprocessing's workers) come so.
    """
    _, _, after = message.partition(_TRACEBACK)
    for line in after.splitlines():
        if line and not line[0].isspace():
            return line
    return _first_line(message)
