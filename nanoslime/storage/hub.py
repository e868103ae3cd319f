"""Finds a checkpoint by its directory or hub id."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

from nanoslime.plugins import resolve
from nanoslime.storage.safetensors_file import require_weights
from nanoslime.types import RunError

# huggingface_hub is slow to import, as slow as planning a run: only a hub id needs it.
_HUB = {"hub": "huggingface_hub:snapshot_download"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.safetensors")
# They show that the hub answers, before larger files are asked for.
_SMALL_FILES = ("config.json", "README.md")
_ANSWER_DEADLINE_S = 30.0
# The same weights once more, in the form of their maker.
_HUB_IGNORED = ("original/*", "consolidated*")


@dataclass(frozen=True, slots=True)
class LocalCheckpoint:
    """The absolute directory of a checkpoint, and the commit of a hub snapshot.

    Where it is not whole, only config.json is there.
    """

    directory: Path
    revision: str
    is_whole: bool


def find_checkpoint(name: str, revision: str, *, download: bool) -> LocalCheckpoint:
    """The checkpoint of `model.hf_checkpoint=name`: a directory, or a hub id to fetch.

    download: a hub id is fetched whole; otherwise only its config.json. The `revision` of
    a hub id becomes the commit that was fetched. Raises RunError for a name that leads
    nowhere, and for a directory without weights that can be read.
    """
    if not name:
        raise RunError(
            "model.hf_checkpoint is not set: "
            "give --hf-checkpoint a directory or a hub id (Qwen/Qwen3-4B)"
        )
    directory = Path(name).expanduser().absolute()
    is_local = directory.is_dir()
    if not is_local:
        if not _HUB_ID.fullmatch(name):
            raise RunError(
                f"model.hf_checkpoint={name!r} is neither a directory nor a hub id (OWNER/NAME)"
            )
        files = _HUB_FILES if download else ("config.json",)
        directory = snapshot(name, revision, files, "model.hf_checkpoint")
        revision = directory.name
    is_whole = is_local or download
    if is_whole:
        require_weights(directory)
    return LocalCheckpoint(directory, revision, is_whole)


def snapshot(
    name: str, revision: str, files: Sequence[str], setting: str, kind: str = "model"
) -> Path:
    """The local snapshot of a hub model or data set, whose directory is named after its commit.

    The job itself runs offline. Progress shows on stderr. `setting` is what errors call it.
    """
    snapshot_download = partial(
        resolve("hub", _HUB, setting),
        name,
        repo_type=kind,
        revision=revision or None,
        ignore_patterns=list(_HUB_IGNORED),
    )
    wanted = partial(snapshot_download, allow_patterns=list(files))
    try:
        _in_time(partial(snapshot_download, allow_patterns=list(_SMALL_FILES)))
        return Path(_in_time(wanted) if set(files) <= set(_SMALL_FILES) else wanted())
    except Exception as error:
        # The hub raises OSErrors and ValueErrors, its transports whatever they like.
        cause = error
    try:
        # Without a network, huggingface_hub 1.x does not look for a commit in its cache.
        return Path(wanted(local_files_only=True))
    except Exception:
        raise RunError(
            f"{setting}={name!r} is no directory, and the hub did not give it "
            f"({' '.join(str(cause).split())}); "
            f"give the directory of a {kind}, or fetch it where there is a network"
        ) from cause


def _in_time(call: Callable[[], str]) -> str:
    """What the call gives. Raises TimeoutError where the hub does not answer: a network may accept
    connections and say nothing, to which huggingface_hub comes back again and again."""
    answers: SimpleQueue[str | Exception] = SimpleQueue()

    def ask() -> None:
        try:
            answers.put(call())
        except Exception as error:
            answers.put(error)

    Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=_ANSWER_DEADLINE_S)
    except Empty:
        raise TimeoutError(f"no answer within {_ANSWER_DEADLINE_S:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer
