"""The code that a job runs: a copy of this checkout's in the run's directory, made when the job is
submitted, so that nothing changes it that is edited while the job waits or runs.

    RUN/code/1/   of the first submission: nanoslime/ jobs/ tools/ SHA256
    RUN/code/2/   of a submission that resumed the run

A conversion has no such directory, and its job's copy lies beside the job's log.

A module of the user's own (a reward, an environment) is none of it, and is read where it lies.
"""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from jobs.checkout import ROOT
from nanoslime.processes.command import ask
from nanoslime.types import RunError

_FOLDERS = ("nanoslime", "jobs", "tools")
# What is code where git cannot say it.
_SUFFIXES = (".py", ".json", ".yaml", ".html", ".md")
_DIGEST = "SHA256"
_GIT_DEADLINE_S = 30.0


def next_place(run_dir: Path) -> Path:
    """Where the next snapshot of a run goes."""
    return run_dir / "code" / str(max(_numbers(run_dir), default=0) + 1)


def newest(run_dir: Path) -> Path:
    """The code with which a run was last submitted; this checkout where there is no snapshot."""
    numbers = _numbers(run_dir)
    return run_dir / "code" / str(max(numbers)) if numbers else ROOT


def take(place: Path, root: Path = ROOT) -> Path:
    """Copies the code of the checkout `root` to a new directory and returns it.

    SHA256 in it is the checksum of all names and contents.
    """
    staged = place.with_name(f".new-{place.name}")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        digest = _copy(root, staged)
        (staged / _DIGEST).write_text(digest + "\n")
        staged.rename(place)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    return place


def _copy(root: Path, target: Path) -> str:
    """Copies the code of a checkout; returns the checksum of all names and contents."""
    digest = hashlib.sha256()
    for name in sorted(set(_names(root))):
        content = (root / name).read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
        file = target / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return digest.hexdigest()


def describe(place: Path) -> str:
    """What a user is told of the snapshot that was taken just now."""
    digest = (place / _DIGEST).read_text().strip()
    text = f"code: {place} (sha256 {digest[:12]}), whatever is edited from now on"
    before = place.with_name(str(int(place.name) - 1)) / _DIGEST
    if before.exists():
        is_same = before.read_text().strip() == digest
        text += f"; {'the same as' if is_same else 'other code than'} {before.parent}"
    return text


def _numbers(run_dir: Path) -> list[int]:
    return [int(place.name) for place in (run_dir / "code").glob("[0-9]*")]


def _names(root: Path) -> Iterator[str]:
    """The files below `root` that are code: what git tracks, and any other .py."""
    is_tracked = _tracked(root)
    for folder in _FOLDERS:
        for path in (root / folder).rglob("*"):
            name = str(path.relative_to(root))
            is_code = name in is_tracked if is_tracked else path.suffix in _SUFFIXES
            if (is_code or path.suffix == ".py") and path.is_file():
                yield name


def _tracked(root: Path) -> set[str]:
    """The files that git tracks there; none where git does not answer, or tracks nothing there."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--", *_FOLDERS]
    try:
        return set(filter(None, ask(command, _GIT_DEADLINE_S).stdout.split("\0")))
    except (OSError, RunError):
        return set()
