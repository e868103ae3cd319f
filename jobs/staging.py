"""A run's model on a node's own disk: copied once, for all its readers and for later runs.

    <cluster.local_storage>/nanoslime-<uid>/
        <model>-<key>/        a copy; the key stands for the source, and its files' sizes and times
        <model>-<key>.lock    held shared by the runs that use the copy, alone by who copies it

    python -m jobs.staging SOURCE STORAGE SHARED RESULT LOCK
        LOCK is the number of the open lock file, which the agent that starts this keeps open

Of the agents and jobs on a node one reads the shared files; what it has read is hashed, and has to
be what the other nodes of the run have read. A later run reads the copy instead, hashes it again,
and copies anew what has become another. The oldest copies that nobody uses make room for new ones.
All read the shared files where the copy would be in memory, or not on the node, or has no room.
"""

import fcntl
import logging
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import BufferedWriter
from pathlib import Path

import xxhash

from jobs.checkout import module_command
from nanoslime.config.cluster import ClusterConfig
from nanoslime.config.run import RunConfig
from nanoslime.processes.logs import FORMAT, last_line
from nanoslime.run_dir import Attempt
from nanoslime.storage.safetensors_file import read_headers
from nanoslime.storage.shared_files import as_json, publish_json, publish_once, read_json
from nanoslime.types import MachineFailure, RunError

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 8 * 2**20
# A filesystem that is nearly full is slow, and others use it too.
_ROOM_FACTOR = 1.05
_KILL_WAIT_S = 2.0
_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
_NOT_LOCAL = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "fuse.sshfs", "9p")
_MANIFEST = ".manifest.json"
# Weights in other forms than the one that is read.
_UNREAD = (".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True, slots=True)
class Staged:
    """Where the readers of a node find the model."""

    model: str
    copied_bytes: int = 0
    # Why it is not on the node; empty where it is.
    note: str = ""


@dataclass(frozen=True, slots=True)
class Copy:
    """The copy of a model's directory in a node's storage, which need not exist yet."""

    source: Path
    storage: Path
    key: str
    num_bytes: int

    @classmethod
    def of(cls, source: Path, storage: Path) -> "Copy":
        digest = xxhash.xxh3_64(os.fsencode(source.resolve()))
        num_bytes = 0
        for file in model_files(source):
            facts = file.stat()
            digest.update(f"{file.name} {facts.st_size} {facts.st_mtime_ns}".encode())
            num_bytes += facts.st_size
        return cls(source, own_folder(storage), f"{source.name}-{digest.hexdigest()}", num_bytes)

    @property
    def path(self) -> Path:
        return self.storage / self.key

    def open_lock(self) -> int:
        """The lock file, whose descriptor holds the lock as long as any process has it open."""
        self.storage.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(self.storage / f"{self.key}.lock", os.O_RDWR | os.O_CREAT, 0o600)


def own_folder(storage: Path) -> Path:
    """Our part of a node's storage."""
    return storage / f"nanoslime-{os.getuid()}"


def kept_caches(cluster: ClusterConfig) -> Path | None:
    """Where a node keeps what it compiles, made if need be; None: wherever each library does."""
    if not (cluster.caches or cluster.local_storage):
        return None
    own = own_folder(Path(cluster.local_storage))
    folder = Path(cluster.caches) if cluster.caches else own / "caches"
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        logger.warning("what is compiled is not kept in %s: %s", folder, error)
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def model_files(source: Path) -> list[Path]:
    """The files of a model's directory that its readers open; links lead to their targets."""
    files = [file for file in sorted(source.iterdir()) if file.is_file()]
    return [file for file in files if file.suffix not in _UNREAD and file.name[0] != "."]


def stage(copy: Copy, shared: Path, lock: int) -> Staged:
    """The model on this node, and the lock held shared; `shared` is the run's directory.

    RunError where what was read twice is not what the other nodes have read.
    """
    copied_bytes = 0
    fcntl.flock(lock, fcntl.LOCK_SH)
    found = _hash_all(copy.path)
    for _ in range(2):
        if found is None:
            # Another one may have copied it before this one is alone.
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = _hash_all(copy.path)
        if found is None:
            note = _make_room(copy)
            if note:
                return Staged(str(copy.source), note=note)
            found = _copy(copy)
            copied_bytes += copy.num_bytes
        differing = _differing(found, copy, shared)
        if not differing:
            fcntl.flock(lock, fcntl.LOCK_SH)
            os.utime(copy.path)
            return Staged(str(copy.path), copied_bytes)
        logger.warning("%s of %s is not what the run's other nodes have", differing, copy.path)
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(copy.path)
        found = None
    raise RunError(
        f"{copy.source / differing} was read twice on {os.uname().nodename}, and is not what the "
        "other nodes have read; the shared filesystem or the node's memory or disk is broken"
    )


def why_not(storage: Path, container: str = "none") -> str:
    """Why nothing is copied to a directory; empty where it may be. `container`: as in the cluster
    file.
    """
    kind = _filesystem(storage)
    if container != "none" and "overlay" in kind:
        return f"cluster.local_storage={storage} is in the container ({kind}), and ends with it"
    if kind in _IN_MEMORY:
        return f"cluster.local_storage={storage} is in the node's memory ({kind})"
    if kind in _NOT_LOCAL:
        return f"cluster.local_storage={storage} is not on the node itself ({kind})"
    return ""


def _filesystem(path: Path) -> str:
    """The kind of the filesystem at a path, as /proc/mounts tells; of two at one place the later
    one counts.
    """
    found = ("", "")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        place = place.replace("\\040", " ")
        if path.resolve().is_relative_to(place) and len(place) >= len(found[0]):
            found = (place, kind)
    return found[1]


def _hash_all(folder: Path) -> dict[str, str] | None:
    """The hashes of a copy's files; None where there is none, or it is not what it was."""
    if not (folder / _MANIFEST).exists():
        return None
    kept = read_json(folder / _MANIFEST)
    found = {name: _hashed(folder / name) for name in kept if (folder / name).exists()}
    return found if found == kept else None


def _copy(copy: Copy) -> dict[str, str]:
    """Copies all files and returns their hashes. RunError where one of them is no whole file."""
    aside = copy.storage / f".{copy.key}"
    aside.mkdir(mode=0o700)
    hashes = {}
    try:
        for file in model_files(copy.source):
            with (aside / file.name).open("wb") as target:
                hashes[file.name] = _hashed(file, target)
        read_headers(aside)
        publish_json(aside / _MANIFEST, hashes)
        os.rename(aside, copy.path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return hashes


def _hashed(source: Path, target: BufferedWriter | None = None) -> str:
    """The hash of a file, which is written to the target as it is read."""
    digest = xxhash.xxh3_128()
    with source.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            if target is not None:
                target.write(block)
    return digest.hexdigest()


def _differing(found: dict[str, str], copy: Copy, shared: Path) -> str:
    """A file that is not what the first node of the run to read it has had; empty without one."""
    manifest = shared / f"manifest-{copy.key}.json"
    publish_once(manifest, as_json(found))
    first = read_json(manifest)
    return next((name for name in first if found.get(name) != first[name]), "")


def _make_room(copy: Copy) -> str:
    """Removes what is left of this copy, all halves that nobody goes on with, and as far as needed
    the oldest copies that nobody uses; says where that is too few.
    """
    needed = copy.num_bytes * _ROOM_FACTOR
    for own in (copy.path, copy.storage / f".{copy.key}"):
        shutil.rmtree(own, ignore_errors=True)
    folders = [folder for folder in copy.storage.iterdir() if folder.is_dir()]
    halves = [folder for folder in folders if folder.name[0] == "."]
    whole = [folder for folder in folders if (folder / _MANIFEST).exists()]
    oldest = sorted(set(whole) - set(halves), key=lambda folder: folder.stat().st_mtime)
    for folder in [*halves, *oldest]:
        if folder in oldest and shutil.disk_usage(copy.storage).free >= needed:
            break
        lock_file = copy.storage / f"{folder.name.removeprefix('.')}.lock"
        with lock_file.open("a") as lock, suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            logger.info("%s makes room for %s", folder, copy.key)
            shutil.rmtree(folder)
    free = shutil.disk_usage(copy.storage).free
    if free >= needed:
        return ""
    return (
        f"{copy.storage} has {free / 2**30:.1f} GiB free, and a copy of {copy.source} "
        f"takes {needed / 2**30:.1f} GiB"
    )


def wants_copy(config: RunConfig) -> bool:
    """Whether the nodes of a run have the model on their own disks."""
    cluster = config.cluster
    return bool(cluster.local_storage and cluster.stage_model and config.model.hf_checkpoint)


class Staging:
    """The copy of a run's model on an agent's node, made by a process of its own."""

    def __init__(self, attempt: Attempt, config: RunConfig, node: int) -> None:
        self._result = attempt.staged(node)
        self._result.parent.mkdir(exist_ok=True)
        self._log = attempt.log("staging", node)
        self._source = config.model.hf_checkpoint
        self._child: subprocess.Popen[bytes] | None = None
        # Open, and so held, as long as this process lives.
        self._lock = -1
        copy = Copy.of(Path(self._source), Path(config.cluster.local_storage))
        command = [*module_command(sys.executable, "jobs.staging"), self._source]
        command += [config.cluster.local_storage, str(attempt.run.path), str(self._result)]
        unfit = why_not(copy.storage, config.cluster.container)
        if unfit:
            self.give_up(unfit)
            return
        try:
            self._lock = copy.open_lock()
        except OSError as error:
            self.give_up(f"nothing can be written there: {error}")
            return
        with self._log.open("ab") as output:
            self._child = subprocess.Popen(
                [*command, str(self._lock)], stdout=output, stderr=output, pass_fds=[self._lock]
            )

    def is_done(self) -> bool:
        """Whether the readers may begin. MachineFailure where this node reads something else than
        the others do.
        """
        code = self._child.poll() if self._child else 0
        if code:
            raise MachineFailure(f"{last_line(self._log)}; log: {self._log}")
        return code == 0

    def give_up(self, why: str) -> None:
        """The readers of this node take the shared files."""
        if self._child:
            self._child.kill()
            # One that waits for a dead file server ends later.
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(_KILL_WAIT_S)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        publish_json(self._result, asdict(Staged(self._source, note=why)))


def main(argv: list[str]) -> int:
    source, storage, shared, result, lock = argv
    logging.basicConfig(level=logging.INFO, format=FORMAT)
    copy = Copy.of(Path(source), Path(storage))
    try:
        staged = stage(copy, Path(shared), int(lock))
    except OSError as error:
        staged = Staged(source, note=f"the copy in {copy.storage} failed: {error}")
    except RunError as error:
        logger.error("%s", error)
        return 1
    if staged.note:
        fcntl.flock(int(lock), fcntl.LOCK_UN)
    publish_json(Path(result), asdict(staged))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
