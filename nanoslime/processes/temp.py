"""A temporary directory for this process and its children alone, with room for sockets.

Others can write in /tmp, so that what a library finds there by name may be theirs. Ray and SGLang
put AF_UNIX sockets below TMPDIR, and the kernel takes 107 bytes for the path of one. Ray's own part
of it takes 68.
"""

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from nanoslime.processes.shared_memory import remove_announced
from nanoslime.types import RunError

logger = logging.getLogger(__name__)

_PREFIX = "ns-"
# A file in each of our directories that its process has locked as long as it lives.
_OWNER = "owner"
_MAX_BYTES = 107 - 68 - 2
# Of the directory in which ours lies: tempfile adds eight letters, and the path a slash.
_MAX_PARENT_BYTES = _MAX_BYTES - 1 - len(_PREFIX) - 8
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")
# Ray prefers the second.
_VARIABLES = ("TMPDIR", "RAY_TMPDIR")


@contextmanager
def private_tmpdir() -> Iterator[None]:
    """Inside, TMPDIR is a new directory (0700), which is removed at the end with what is in it.

    It lies in the directory of RAY_TMPDIR or TMPDIR, or where that has no room in one with a
    shorter path. One without room that nobody else can enter stays: the node's agent has made it.
    Those that killed processes of this user have left beside it go. Raises RunError where no
    directory with a short path can be written.
    """
    parent = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    num_bytes = len(os.fsencode(parent))
    if num_bytes > _MAX_PARENT_BYTES:
        if (
            num_bytes <= _MAX_BYTES
            and os.path.isdir(parent)
            and os.stat(parent).st_mode & 0o77 == 0
        ):
            yield
            return
        parent = _short_directory(parent)
    before = {name: os.environ.get(name, "") for name in _VARIABLES}
    os.makedirs(parent, exist_ok=True)
    _remove_left(Path(parent))
    with (
        tempfile.TemporaryDirectory(
            prefix=_PREFIX, dir=parent, ignore_cleanup_errors=True
        ) as directory,
        open(f"{directory}/new", "w") as owner,
    ):
        fcntl.flock(owner, fcntl.LOCK_EX)
        os.rename(owner.name, f"{directory}/{_OWNER}")
        _set_variables(dict.fromkeys(_VARIABLES, directory))
        try:
            yield
        finally:
            _set_variables(before)


def _remove_left(parent: Path) -> None:
    """Removes this user's directories in `parent` whose processes are gone. In those of others
    nothing is opened: it might be a FIFO.
    """
    for directory in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if directory.lstat().st_uid == os.getuid():
                with (directory / _OWNER).open() as owner:
                    fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    remove_announced(directory)
                    shutil.rmtree(directory, ignore_errors=True)


def _set_variables(values: Mapping[str, str]) -> None:
    """An empty value stands for a variable that is not set."""
    for name, value in values.items():
        os.environ[name] = value
        if not value:
            del os.environ[name]
    tempfile.tempdir = None


def _short_directory(directory: str) -> str:
    """What takes the place of `directory`."""
    usable = [short for short in _SHORT if os.access(short, os.W_OK | os.X_OK)]
    if not usable:
        raise RunError(
            f"TMPDIR={directory} is longer than {_MAX_PARENT_BYTES} bytes, which leaves sockets in "
            f"it no room, and none of {', '.join(_SHORT)} can be written; set a shorter TMPDIR"
        )
    logger.warning(
        "TMPDIR=%s is longer than %d bytes, which leaves sockets in it no room: %s is used",
        directory,
        _MAX_PARENT_BYTES,
        usable[0],
    )
    return usable[0]
