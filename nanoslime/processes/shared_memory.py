"""Names in /dev/shm that outlive the processes which made them.

Who starts such a process announces how the names begin, in a file of its private temporary
directory. Whoever removes that directory removes the names, also where nobody lives who knew them.
"""

import os
from contextlib import suppress
from pathlib import Path

_SHARED_MEMORY = Path("/dev/shm")
_FILE = "shared-names"


def announce(beginning: str) -> None:
    """Says how names begin that a child leaves behind; nothing where TMPDIR is open to others."""
    folder = Path(os.environ.get("TMPDIR", ""))
    if folder.is_absolute() and folder.stat().st_mode & 0o77 == 0:
        with (folder / _FILE).open("a") as file:
            file.write(f"{beginning}\n")


def remove_names(beginning: str) -> None:
    for left in _SHARED_MEMORY.iterdir():
        if left.name.startswith(beginning):
            with suppress(OSError):
                left.unlink()


def remove_announced(folder: Path) -> None:
    """Removes the names that were announced in a temporary directory of this user, where nothing
    that has them runs any more.
    """
    with suppress(OSError):
        for beginning in filter(None, (folder / _FILE).read_text().splitlines()):
            remove_names(beginning)
