"""The table of a sweep's elements, sweep.json in its directory.

sweep.json      name, the file that asked for it, and of each element setting, seed and run
sweep.yaml      a copy of that file
array.sbatch    the job array's script, where SLURM has it
<name>-<index>/ the run directories
"""

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from nanoslime.run_dir import RunDir
from nanoslime.storage.shared_files import publish_json, read_json
from nanoslime.types import RunError

TABLE = "sweep.json"
# It was published whole, so that what is no JSON will not become any.
_READ_S = 0.5


@dataclass(frozen=True, slots=True)
class Row:
    index: int
    setting: str
    seed: int
    # The name of the run's directory.
    run: str


@dataclass(frozen=True, slots=True)
class Table:
    directory: Path
    # The file that asked for it, as an absolute path.
    source: str
    rows: tuple[Row, ...]

    def write(self) -> None:
        rows = [asdict(row) for row in self.rows]
        publish_json(self.directory / TABLE, {"source": self.source, "rows": rows})

    def run(self, row: Row) -> Path:
        return self.directory / row.run


def is_sweep(path: Path) -> bool:
    return (path / TABLE).is_file()


def read(directory: Path) -> Table:
    """The table of a sweep's directory. Raises RunError where there is none, or it is damaged."""
    path = directory / TABLE
    if not path.is_file():
        raise RunError(f"{directory} is not the directory of a sweep: it has no {TABLE}")
    content = read_json(path, _READ_S)
    try:
        rows = tuple(
            Row(int(row["index"]), str(row["setting"]), int(row["seed"]), str(row["run"]))
            for row in content["rows"]
        )
        return Table(directory.absolute(), str(content["source"]), rows)
    except (KeyError, TypeError, ValueError) as e:
        raise RunError(f"{path} is no table of a sweep: {type(e).__name__}: {e}") from e


def damage(directory: Path) -> str:
    """Why a sweep's table cannot be read; empty where it can."""
    try:
        read(directory)
    except (RunError, OSError) as error:
        return str(error)
    return ""


def runs_of(paths: Iterable[Path]) -> list[Path]:
    """These runs, with a sweep's runs in the place of its directory.

    A run whose directory was deleted is none of its sweep any more. Where the sweep's table is
    damaged, its runs are those that lie in its directory.
    """
    found = []
    for path in paths:
        if not is_sweep(path):
            found.append(path)
        elif damage(path):
            found += [path / name for name in sorted(os.listdir(path)) if _is_run(path / name)]
        else:
            table = read(path)
            found += [table.run(row) for row in table.rows if _is_run(table.run(row))]
    return found


def _is_run(path: Path) -> bool:
    return RunDir(path).attempts.is_dir()
