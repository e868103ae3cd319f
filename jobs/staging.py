"""What a run reads on a node's own disk: its model and, where asked for, its environment, copied
once for all their readers and for later runs.

    <cluster.local_storage>/nanoslime-<uid>/
        <name>-<key>/        a copy; the key stands for the source, and its files' sizes and times
        <name>-<key>.lock    held shared by the runs that use the copy, alone by who copies it

tools/staging/model.py and tools/staging/environment.py make the copies, each as a process that an
agent starts. Of the agents and jobs on a node one reads the shared files. All read the shared files
where the copy would be in memory, or not on the node, or has no room.
"""

import logging
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from jobs.checkout import module_command
from nanoslime.config.cluster import ClusterConfig
from nanoslime.config.run import RunConfig
from nanoslime.processes.logs import last_line
from nanoslime.run_dir import Attempt, RunDir
from nanoslime.storage.shared_files import publish_json, read_json, seen
from nanoslime.types import MachineFailure

logger = logging.getLogger(__name__)

_KILL_WAIT_S = 2.0
_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
_NOT_LOCAL = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "fuse.sshfs", "9p")
# Weights in other forms than the one that is read.
_UNREAD = (".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True, slots=True)
class Staged:
    """Where the readers of a node find the model, or the environment."""

    path: str
    copied_bytes: int = 0
    # Why it is not on the node; empty where it is.
    note: str = ""


@dataclass(frozen=True, slots=True)
class Copy:
    """The copy of a model or an environment in a node's storage, which need not exist yet."""

    source: Path
    storage: Path
    key: str
    num_bytes: int

    @classmethod
    def of(cls, source: Path, storage: Path) -> "Copy":
        """That of a model's directory."""
        digest = xxhash.xxh3_64(os.fsencode(source.resolve()))
        num_bytes = 0
        for file in model_files(source):
            facts = file.stat()
            digest.update(f"{file.name} {facts.st_size} {facts.st_mtime_ns}".encode())
            num_bytes += facts.st_size
        return cls(source, own_folder(storage), f"{source.name}-{digest.hexdigest()}", num_bytes)

    @classmethod
    def of_environment(cls, packed: Path, storage: Path) -> "Copy":
        """That of an environment which tools/staging/environment.py has packed."""
        facts = read_json(packed)
        return cls(Path(facts["venv"]), own_folder(storage), facts["key"], facts["num_bytes"])

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


def wants_copy(config: RunConfig) -> bool:
    """Whether the nodes of a run have the model on their own disks."""
    cluster = config.cluster
    return bool(cluster.local_storage and cluster.stage_model and config.model.hf_checkpoint)


def packed_environment(run: RunDir) -> Path:
    """The file that names the packed environment of which a run's nodes make a copy; there is none
    where the shared one is used.
    """
    return run.path / "environment.json"


@dataclass(frozen=True, slots=True)
class StagingTask:
    """A copy to be made, the words of the program that makes it, and where it reports."""

    copy: Copy
    words: tuple[str, ...]
    result: Path
    log: Path

    @classmethod
    def of_model(cls, attempt: Attempt, config: RunConfig, node: int) -> "StagingTask":
        storage = config.cluster.local_storage
        copy = Copy.of(Path(config.model.hf_checkpoint), Path(storage))
        result = attempt.staged(node)
        words = ("tools.staging.model", config.model.hf_checkpoint, storage, str(attempt.run.path))
        return cls(copy, words, result, attempt.log("staging", node))

    @classmethod
    def of_environment(cls, attempt: Attempt, config: RunConfig, node: int) -> "StagingTask":
        storage = config.cluster.local_storage
        packed = packed_environment(attempt.run)
        copy = Copy.of_environment(packed, Path(storage))
        result = attempt.path / "environments" / f"{node}.json"
        words = ("tools.staging.environment", str(packed), storage)
        return cls(copy, words, result, attempt.log("environment", node))


class Staging:
    """The copy of a run's model or environment on an agent's node, made by a process of its own."""

    def __init__(self, task: StagingTask, container: str = "none") -> None:
        """container: as in the cluster file."""
        self._task = task
        self._child: subprocess.Popen[bytes] | None = None
        # Open, and so held, as long as this process lives.
        self._lock = -1
        task.result.parent.mkdir(exist_ok=True)
        unfit = why_not(task.copy.storage, container)
        if unfit:
            self.give_up(unfit)
            return
        try:
            self._lock = task.copy.open_lock()
        except OSError as error:
            self.give_up(f"nothing can be written there: {error}")
            return
        program, *words = task.words
        command = [*module_command(sys.executable, program), *words, str(task.result)]
        with task.log.open("ab") as output:
            self._child = subprocess.Popen(
                [*command, str(self._lock)], stdout=output, stderr=output, pass_fds=[self._lock]
            )

    def is_done(self) -> bool:
        """Whether the readers may begin. MachineFailure where this node reads something else than
        the others do.
        """
        code = self._child.poll() if self._child else 0
        if code:
            log = self._task.log
            raise MachineFailure(f"{last_line(log)}; log: {log}")
        return code == 0

    def result(self) -> Staged:
        """Where this node's readers find it."""
        return Staged(**read_json(self._task.result))

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
        publish_json(self._task.result, asdict(Staged(str(self._task.copy.source), note=why)))


class NodeStaging:
    """All that a node of a run copies, each by a process of its own, at the same time. It holds the
    copies as long as this process lives.
    """

    def __init__(self, attempt: Attempt, config: RunConfig, node: int) -> None:
        place = (attempt, config, node)
        container = config.cluster.container
        self._deadline_s = config.cluster.stage_deadline_s
        self._stagings: list[Staging] = []
        self._environment: Staging | None = None
        if wants_copy(config):
            self._stagings.append(Staging(StagingTask.of_model(*place), container))
        if seen(packed_environment(attempt.run)):
            self._environment = Staging(StagingTask.of_environment(*place), container)
            self._stagings.append(self._environment)

    def is_done(self) -> bool:
        """Whether all are; raises as `Staging.is_done` does."""
        return all([staging.is_done() for staging in self._stagings])

    def give_up(self) -> None:
        """What is not done by now is read from the shared files."""
        for staging in self._stagings:
            if not staging.is_done():
                staging.give_up(
                    f"a copy took longer than cluster.stage_deadline_s={self._deadline_s:g}"
                )

    def venv(self) -> Path | None:
        """The copy of the environment; None where the shared one is used."""
        staged = self._environment.result() if self._environment else None
        if staged is None:
            return None
        if staged.note:
            logger.warning("the shared environment is used: %s", staged.note)
            return None
        return Path(staged.path)
