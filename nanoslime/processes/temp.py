"""A temporary directory whose path leaves room for sockets.

Ray and SGLang put AF_UNIX sockets below TMPDIR, and the kernel takes 107 bytes for the path of
one. Ray's own part of it takes 68.
"""

import logging
import os
import tempfile

from nanoslime.types import RunError

logger = logging.getLogger(__name__)

_MAX_BYTES = 107 - 68 - 2
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")


def ensure_short_tmpdir() -> None:
    """Points TMPDIR of this process and its children elsewhere where its path is too long.

    So it does with RAY_TMPDIR, which Ray prefers. Neither has to exist: Ray makes what they name.
    Raises RunError where no directory with a short path can be written.
    """
    named = {"TMPDIR": max(os.environ.get("TMPDIR", ""), tempfile.gettempdir(), key=len)}
    if "RAY_TMPDIR" in os.environ:
        named["RAY_TMPDIR"] = os.environ["RAY_TMPDIR"]
    for name, directory in named.items():
        if len(os.fsencode(directory)) > _MAX_BYTES:
            os.environ[name] = _short_directory(name, directory)
            tempfile.tempdir = None


def _short_directory(name: str, directory: str) -> str:
    """What takes the place of `directory`, the value of the variable `name`."""
    usable = [short for short in _SHORT if os.access(short, os.W_OK | os.X_OK)]
    if not usable:
        raise RunError(
            f"{name}={directory} is longer than {_MAX_BYTES} bytes, which leaves sockets in it no "
            f"room, and none of {', '.join(_SHORT)} can be written; set a shorter {name}"
        )
    logger.warning(
        "%s=%s is longer than %d bytes, which leaves sockets in it no room: %s is used",
        name,
        directory,
        _MAX_BYTES,
        usable[0],
    )
    return usable[0]
