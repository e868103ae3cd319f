"""The run directory of a submission, which a refusal leaves as it was."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nanoslime.run_dir import RunDir
from nanoslime.storage.shared_files import publish
from tools.submit import where

# submitit's folder in a run directory.
SUBMITIT_FOLDER = "slurm"
# A submission writes only such files beside it.
_KINDS = (".yaml", ".json", ".sbatch")


@contextmanager
def alone(resumed: RunDir | None) -> Iterator[None]:
    """Of submissions that resume a run at the same time one goes on; the others wait for it and
    are refused, since the run then has its job.
    """
    if resumed is None:
        yield
        return
    with (resumed.path / ".submitting").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        where.refuse_if_job_lives(resumed)
        yield


@contextmanager
def kept_if_accepted(
    run_root: Path, name: str, resumed: RunDir | None, share: str = ""
) -> Iterator[RunDir]:
    """The resumed run, or a new one; where the block raises, all files are as before."""
    missing = [folder for folder in (run_root, *run_root.parents) if not folder.exists()]
    before = {}
    if resumed is not None:
        before = {file: file.read_bytes() for file in _written(resumed.path)}
    run = resumed or RunDir.create(run_root, name, share)
    folder = run.path / SUBMITIT_FOLDER
    of_submitit = set(folder.glob("*"))
    code = run.path / "code"
    snapshots = set(code.glob("*"))
    try:
        yield run
    except BaseException:
        if resumed is None:
            shutil.rmtree(run.path)
        for file in {*_written(run.path), *folder.glob("*")} - before.keys() - of_submitit:
            file.unlink()
        for file, content in before.items():
            publish(file, content)
        for snapshot in set(code.glob("*")) - snapshots:
            shutil.rmtree(snapshot)
        for made in (folder, code, *missing):
            if made.is_dir() and not os.listdir(made):
                made.rmdir()
        raise


def _written(run: Path) -> list[Path]:
    return [file for file in run.glob("*") if file.suffix in _KINDS]
