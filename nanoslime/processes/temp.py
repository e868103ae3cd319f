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

    Raises RunError where no directory with a short path can be written.
    """
    directory = tempfile.gettempdir()
    if len(os.fsencode(directory)) <= _MAX_BYTES:
        return
    usable = [short for short in _SHORT if os.access(short, os.W_OK | os.X_OK)]
    if not usable:
        raise RunError(
            f"TMPDIR={directory} is longer than {_MAX_BYTES} bytes, which leaves sockets in it no "
            f"room, and none of {', '.join(_SHORT)} can be written; set a shorter TMPDIR"
        )
    logger.warning(
        "TMPDIR=%s is longer than %d bytes, which leaves sockets in it no room: %s is used",
        directory,
        _MAX_BYTES,
        usable[0],
    )
    os.environ["TMPDIR"] = usable[0]
    tempfile.tempdir = None
