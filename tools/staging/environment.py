"""A run's virtual environment on a node's own disk: packed once where the run is submitted, and
unpacked on each node.

    RUN_ROOT/.environments/<name>-<key>.tar    all files of the environment, as one
    RUN_ROOT/.environments/<name>-<key>.json   its hash, its size, and where the environment lies
    RUN/environment.json                       the same, of the one that the run uses

    python -m tools.staging.environment PACKED STORAGE RESULT LOCK
        PACKED is the run's environment.json, and LOCK the number of the open lock file, which the
        agent that starts this keeps open

An environment has tens of thousands of small files, each of which costs a shared filesystem a few
questions; one tar costs it a stream. What a node has unpacked is hashed, and a later run hashes it
again before it uses it. The paths in its scripts are those of the copy, so that its `bin/python`
and all that this starts are the copy's own. The interpreter itself, with its standard library, is
no part of a virtual environment: it is read where pyvenv.cfg says, on each node.
"""

import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from io import BufferedWriter
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from jobs.sbatch import python_of
from jobs.staging import Copy, packed_environment
from nanoslime.config.run import RunConfig
from nanoslime.run_dir import RunDir
from nanoslime.storage.shared_files import publish_json, read_json, written_aside
from nanoslime.types import RunError
from tools.staging import copies

FOLDER = ".environments"
# Of the packed states of one environment so many are kept; jobs that wait may need them.
_NUM_KEPT = 3
_DISK_BLOCK_BYTES = 4096
# tarfile copies all that it holds at each of its small reads and writes, so that it holds little.
_PIECE_BYTES = 2**16
# Linux takes no longer first line of a script.
_MAX_SHEBANG_BYTES = 127
_CHECK_DEADLINE_S = 60.0


def record(config: RunConfig, run: RunDir) -> None:
    """Says in a run's directory of which packed environment its nodes make a copy, and packs it if
    need be; says nothing where the shared one is to be used.
    """
    packed_environment(run).unlink(missing_ok=True)
    if config.cluster.stage_environment:
        facts = pack(venv_of(config), Path(config.cluster.run_root) / FOLDER)
        publish_json(packed_environment(run), facts)


def venv_of(config: RunConfig) -> Path:
    """The virtual environment of a run's job. Raises RunError where it has none."""
    venv = Path(python_of(config)).absolute().parent.parent
    if (venv / "pyvenv.cfg").is_file():
        return venv
    raise RunError(
        f"cluster.stage_environment is set, and {venv} is no virtual environment: it has no "
        "pyvenv.cfg; set cluster.venv to one, or leave cluster.stage_environment out"
    )


def pack(venv: Path, folder: Path) -> dict[str, Any]:
    """The packed form of an environment as it is now, made unless it is there."""
    found = list(_files(venv))
    digest = xxhash.xxh3_64(os.fsencode(venv.resolve()))
    num_bytes = 0
    for file, facts in found:
        digest.update(f"{file} {facts.st_size} {facts.st_mtime_ns} {facts.st_mode}\n".encode())
        num_bytes += -(-facts.st_size // _DISK_BLOCK_BYTES) * _DISK_BLOCK_BYTES
    key = f"{venv.name.lstrip('.')}-{digest.hexdigest()}"
    tar = folder / f"{key}.tar"
    described = tar.with_suffix(".json")
    if described.exists() and tar.exists():
        os.utime(described)
        return dict(read_json(described))
    size = f"{num_bytes / 2**30:.1f} GiB in {len(found)} files"
    print(f"packing the environment {venv} ({size}), once until it changes", file=sys.stderr)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with written_aside(tar, 0o600) as file:
        writer = _Hashed(file)
        _write(venv, [name for name, _ in found], writer)
    facts_of_tar = {
        "venv": str(venv),
        "key": key,
        "tar": str(tar),
        "xxh3_128": writer.digest.hexdigest(),
        "num_bytes": num_bytes,
    }
    publish_json(described, facts_of_tar)
    _remove_older(described, str(venv))
    return facts_of_tar


def _files(venv: Path) -> Iterator[tuple[str, os.stat_result]]:
    """All that an environment holds, directories too, by names relative to it, in their order."""
    for folder, folders, files in os.walk(venv):
        folders.sort()
        for name in sorted([*folders, *files]):
            path = os.path.join(folder, name)
            yield os.path.relpath(path, venv), os.lstat(path)


def _write(venv: Path, names: list[str], target: "_Hashed") -> None:
    with tarfile.open(fileobj=target, mode="w|", bufsize=_PIECE_BYTES) as tar:
        for name in names:
            path = venv / name
            member = tarfile.TarInfo(name)
            member.mtime = int(path.lstat().st_mtime)
            member.mode = path.lstat().st_mode & 0o777
            if path.is_symlink() and not _is_package_file(path, venv):
                member.type = tarfile.SYMTYPE
                member.linkname = _link_in_copy(path, venv)
                tar.addfile(member)
            elif path.is_dir():
                member.type = tarfile.DIRTYPE
                tar.addfile(member)
            else:
                with path.open("rb") as content:
                    facts = os.fstat(content.fileno())
                    member.size = facts.st_size
                    # Compiled bytecode names the time of its source.
                    member.mtime = int(facts.st_mtime)
                    tar.addfile(member, content)


def _is_package_file(link: Path, venv: Path) -> bool:
    """Whether a link stands for a file of a package that lies elsewhere, as in uv's cache; the
    interpreter is a link too, and stays one.
    """
    is_interpreter = link.parent == venv / "bin" and link.name.startswith("python")
    return link.is_file() and not is_interpreter and not link.resolve().is_relative_to(venv)


def _link_in_copy(link: Path, venv: Path) -> str:
    """What a link leads to, so that within an environment it stays within the copy."""
    target = os.readlink(link)
    if os.path.isabs(target) and Path(target).is_relative_to(venv):
        return os.path.relpath(target, link.parent)
    return target


def _remove_older(newest: Path, venv: str) -> None:
    """Removes the oldest packed states of an environment."""
    same = [file for file in newest.parent.glob("*.json") if read_json(file)["venv"] == venv]
    for file in sorted(same, key=lambda file: file.stat().st_mtime)[:-_NUM_KEPT]:
        file.unlink()
        file.with_suffix(".tar").unlink(missing_ok=True)


class _Hashed:
    """A file of which all that is read or written is hashed."""

    def __init__(self, file: BinaryIO | BufferedWriter) -> None:
        self._file = file
        self.digest = xxhash.xxh3_128()

    def read(self, size: int) -> bytes:
        block = self._file.read(size)
        self.digest.update(block)
        return block

    def write(self, block: bytes) -> int:
        self.digest.update(block)
        return self._file.write(block)


def unpack(tar: Path, xxh3_128: str, folder: Path) -> tuple[dict[str, str], bool]:
    """Unpacks an environment into a new directory: the hashes of its files, and whether the tar is
    the one that was packed.
    """
    hashes = {}
    with tar.open("rb", buffering=copies.BLOCK_BYTES) as file:
        reader = _Hashed(file)
        try:
            with tarfile.open(fileobj=reader, mode="r|", bufsize=_PIECE_BYTES) as members:
                for member in members:
                    digest = _unpack_one(members, member, folder)
                    if digest:
                        hashes[member.name] = digest
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise RunError(
                f"{tar} is damaged ({error}); remove it, and submit the run again"
            ) from error
        while reader.read(copies.BLOCK_BYTES):
            pass
    return hashes, reader.digest.hexdigest() == xxh3_128


def _unpack_one(members: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> str:
    """The hash of a file; empty for a directory or a link."""
    path = folder / member.name
    if os.path.isabs(member.name) or ".." in Path(member.name).parts:
        raise ValueError(f"{member.name} lies outside of the environment")
    path.parent.mkdir(parents=True, exist_ok=True)
    if member.isdir():
        path.mkdir(exist_ok=True)
        return ""
    if member.issym():
        path.symlink_to(member.linkname)
        return ""
    content = members.extractfile(member)
    if content is None:
        raise ValueError(f"{member.name} is neither a file nor a directory nor a link")
    digest = xxhash.xxh3_128()
    with path.open("wb") as target:
        while block := content.read(copies.BLOCK_BYTES):
            digest.update(block)
            target.write(block)
    path.chmod(member.mode)
    os.utime(path, (member.mtime, member.mtime))
    return digest.hexdigest()


def move(folder: Path, old: Path, new: Path) -> list[str]:
    """Puts the path `new` in the place of `old` where an environment in `folder` names its own: in
    scripts, in pyvenv.cfg and in .pth files. The names of the files that were changed.
    """
    names = {os.fsencode(old), os.fsencode(old.resolve())}
    longest_first = sorted(names, key=len, reverse=True)
    own = re.compile(b"(?:" + b"|".join(map(re.escape, longest_first)) + rb")(?=[/\"'\s]|$)")
    changed = []
    packages = folder.glob("lib/python3.*/site-packages/*.pth")
    for path in [folder / "pyvenv.cfg", *sorted((folder / "bin").iterdir()), *packages]:
        if path.is_symlink() or not path.is_file():
            continue
        text = path.read_bytes()
        if b"\0" in text:
            continue
        moved = own.sub(lambda _: os.fsencode(new), text)
        moved = _with_short_shebang(moved, new)
        if moved != text:
            path.write_bytes(moved)
            changed.append(str(path.relative_to(folder)))
    return changed


def _with_short_shebang(script: bytes, venv: Path) -> bytes:
    """A script whose first line Linux would not take is started by a shell, as pip does it."""
    first, end, rest = script.partition(b"\n")
    interpreter = os.fsencode(venv / "bin") + b"/"
    is_ours = first.startswith(b"#!" + interpreter)
    if not is_ours or (len(first) <= _MAX_SHEBANG_BYTES and b" " not in interpreter):
        return script
    command = first.removeprefix(b"#!")
    return b"#!/bin/sh\n'''exec' \"" + command + b'" "$0" "$@"\n\' \'\'\'' + end + rest


def _check(folder: Path) -> None:
    """OSError where the copy's Python does not start, or is another environment's."""
    python = folder / "bin" / "python"
    command = [str(python), "-I", "-c", "import sys; print(sys.prefix)"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CHECK_DEADLINE_S)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"its Python did not start within {_CHECK_DEADLINE_S:g} s") from error
    if done.stdout.strip() != str(folder):
        said = done.stderr.strip().splitlines()[-1:] or [done.stdout.strip()]
        raise OSError(f"its Python does not start there: {said[0]}")


def main(argv: list[str]) -> int:
    packed, storage, result, lock = argv
    facts = read_json(Path(packed))
    copy = Copy.of_environment(Path(packed), Path(storage))
    tar = Path(facts["tar"])
    is_whole = True

    def fill(folder: Path) -> dict[str, str]:
        nonlocal is_whole
        hashes, is_whole = unpack(tar, facts["xxh3_128"], folder)
        _check(folder)
        for name in move(folder, copy.source, copy.path):
            hashes[name] = copies.hashed(folder / name)
        return hashes

    def differing(found: dict[str, str]) -> str:
        return "" if is_whole else str(tar)

    return copies.run(copy, fill, differing, Path(result), int(lock))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
