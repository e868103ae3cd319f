"""The files of a run directory that a submission writes, and how it takes them back."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from nanoslime.run_dir import RunDir
from nanoslime.storage.shared_files import publish

# submitit's folder in a run directory.
SUBMITIT_FOLDER = "slurm"
_WRITTEN = ("config.yaml", "plan.json", "provenance.json", "job.sbatch", "job.json")


@dataclass(frozen=True, slots=True)
class FilesBefore:
    """What a submission found, so that one which is refused leaves nothing."""

    resumed: bool
    contents: dict[Path, bytes]
    submitit_files: frozenset[str]
    # Folders that did not exist, the innermost first.
    missing: tuple[Path, ...]

    @classmethod
    def of(cls, run_root: Path, resumed: RunDir | None) -> "FilesBefore":
        """`resumed` is None for a new run, which is about to be made in `run_root`."""
        contents = {}
        submitit_files: frozenset[str] = frozenset()
        if resumed is not None:
            files = [resumed.path / name for name in _WRITTEN]
            contents = {file: file.read_bytes() for file in files if file.is_file()}
            folder = resumed.path / SUBMITIT_FOLDER
            if folder.is_dir():
                submitit_files = frozenset(os.listdir(folder))
        folders = (run_root, *run_root.parents)
        missing = tuple(folder for folder in folders if not folder.exists())
        return cls(resumed is not None, contents, submitit_files, missing)

    def restore(self, run: RunDir) -> None:
        """Removes a new run, or gives a resumed one its earlier files."""
        if self.resumed:
            self._restore_resumed(run)
            return
        shutil.rmtree(run.path)
        for folder in self.missing:
            if folder.is_dir() and not os.listdir(folder):
                folder.rmdir()

    def _restore_resumed(self, run: RunDir) -> None:
        for name in _WRITTEN:
            file = run.path / name
            if file in self.contents:
                publish(file, self.contents[file])
            else:
                file.unlink(missing_ok=True)
        folder = run.path / SUBMITIT_FOLDER
        if not folder.is_dir():
            return
        for name in set(os.listdir(folder)) - self.submitit_files:
            (folder / name).unlink()
        if not os.listdir(folder):
            folder.rmdir()
