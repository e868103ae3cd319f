"""Reads the rows of files with prompts, and counts those that cannot be used.

A row of JSON lines, of parquet or of Arrow is a mapping from names to values. A fault of one
row is told apart from a fault of the file: only the first may be left out.
"""

import json
import re
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

from nanoslime.config import DataConfig
from nanoslime.plugins import resolve
from nanoslime.types import RunError

_COMPRESSED = (".gz", ".zst")
_JSON_LINES = (".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
SUFFIXES = (*_JSON_LINES, ".parquet", ".arrow")
# pyarrow is slow to import: it is imported only where a file needs it.
_ARROW = {
    "parquet": "pyarrow.parquet:ParquetFile",
    "input_stream": "pyarrow:input_stream",
    "memory_map": "pyarrow:memory_map",
    "open_stream": "pyarrow.ipc:open_stream",
    "error": "pyarrow:ArrowException",
}
_ROWS_PER_BATCH = 1024
MAX_QUOTED_CHARS = 80
# An escaped half of a surrogate pair in JSON; two halves make a character.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(slots=True)
class Tally:
    """How many prompts of a source are used, and how many are left out, by reason."""

    data: DataConfig
    num_used: int = 0
    num_broken: int = 0
    num_over_long: int = 0
    num_repeated: int = 0
    first_fault: str = ""
    _known: set[Hashable] = field(default_factory=set)

    def broken(self, error: RunError, num_rows: int = 1) -> None:
        """Counts rows that cannot be used. Raises `error` where such rows end the run."""
        if self.data.broken == "error":
            raise error
        self.num_broken += num_rows
        self.first_fault = self.first_fault or str(error)

    def unless_broken[T](self, make: Callable[..., T], *args: Any) -> T | None:
        """What `make` gives for a row; None where it raises RunError, and the row is left out."""
        try:
            return make(*args)
        except RunError as error:
            self.broken(error)
            return None

    def take(self, key: Hashable) -> bool:
        """Counts a prompt, and whether one with its `key`, text and label, came before.

        Returns whether it is used.
        """
        is_repeated = key in self._known
        self.num_repeated += is_repeated
        if is_repeated and self.data.deduplicate:
            return False
        self._known.add(key)
        self.num_used += 1
        return True

    @property
    def num_left_out(self) -> int:
        num_dropped = self.num_repeated if self.data.deduplicate else 0
        return self.num_broken + self.num_over_long + num_dropped

    @property
    def text(self) -> str:
        """What is used and what is not, in one line."""
        parts = [f"{self.num_used} prompts"]
        if self.num_over_long:
            limit = self.data.max_prompt_tokens
            parts.append(f"{self.num_over_long} of over {limit} tokens are left out")
        if self.num_repeated:
            verb = "are left out" if self.data.deduplicate else "are kept (data.deduplicate)"
            parts.append(f"{self.num_repeated} that repeat an earlier one with its label {verb}")
        if self.num_broken:
            parts.append(f"{self.num_broken} broken rows are left out, first: {self.first_fault}")
        return "; ".join(parts)


@dataclass(frozen=True, slots=True)
class Row:
    """`place` is FILE:LINE, or FILE:row N where a file has no lines."""

    place: str
    fields: dict[str, Any]


def read_rows(path: Path, tally: Tally) -> Iterator[Row]:
    """The rows of a file that can be read; the others are counted in `tally`.

    Of a file with columns only those are read that the keys of `tally.data` lead into.
    Raises RunError for another suffix, and for what is no such file; OSError where it
    cannot be read.
    """
    if path.name.endswith(_JSON_LINES):
        return _json_rows(path, tally)
    if path.suffix == ".parquet":
        return _parquet_rows(path, tally)
    if path.suffix == ".arrow":
        return _arrow_rows(path, tally)
    raise RunError(
        f"prompt file {path}: choose a file that ends in .jsonl or .parquet; these are read, too: "
        f"{' '.join(SUFFIXES)}"
    )


def _json_rows(path: Path, tally: Tally) -> Iterator[Row]:
    is_compressed = path.suffix in _COMPRESSED
    open_bytes = resolve("input_stream", _ARROW, "data.prompts") if is_compressed else open
    options = {"compression": "detect"} if is_compressed else {"mode": "rb", "buffering": 0}
    raw: Any = open_bytes(path, **options)
    with BufferedReader(raw) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip(b" \t\r\n\xef\xbb\xbf"):
                continue
            place = f"{path}:{number}"
            fields = tally.unless_broken(_fields, place, line)
            if fields is not None:
                yield Row(place, fields)


def _fields(place: str, line: bytes) -> dict[str, Any]:
    try:
        fields = from_json(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RunError(
            f"{place}: not a line of JSON (not UTF-8, byte 0x{line[error.start]:02x}: "
            f"{error.reason}): convert the file (iconv -f ENCODING -t utf-8)"
        ) from error
    except UnicodeEncodeError as error:
        raise RunError(
            f"{place}: \\u{ord(error.object[error.start]):04x} is half of a surrogate pair "
            "and no character; remove it"
        ) from error
    except (ValueError, RecursionError) as error:
        quoted = line.decode(errors="replace").strip()[:MAX_QUOTED_CHARS]
        raise RunError(
            f"{place}: not a line of JSON ({error}): {quoted!r}; write one object a line "
            "(jq -c .[] makes them of an array)"
        ) from error
    if not isinstance(fields, dict):
        raise RunError(
            f"{place}: a JSON object is needed, found {type(fields).__name__}; write one object a "
            "line (jq -c .[] makes them of an array)"
        )
    return fields


def from_json(text: str) -> Any:
    """Raises UnicodeEncodeError for half of a surrogate pair, which no file of the run can hold;
    ValueError or RecursionError for what is no JSON, or has a key twice."""
    value = json.loads(text, object_pairs_hook=_object)
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return fields


def _parquet_rows(path: Path, tally: Tally) -> Iterator[Row]:
    """Row group by row group: what is damaged in one leaves the others whole."""
    open_parquet = resolve("parquet", _ARROW, "data.prompts")
    arrow_error = resolve("error", _ARROW, "data.prompts")
    try:
        file = open_parquet(path, page_checksum_verification=True)
    except (arrow_error, OSError) as error:
        cause = str(error).partition("\n")[0]
        raise RunError(f"{path} is not a readable parquet file: {cause}") from error
    number = 0
    with file:
        needed = _needed(path, file.schema_arrow.names, tally.data)
        for group in range(file.num_row_groups):
            end = number + file.metadata.row_group(group).num_rows
            batches = file.iter_batches(_ROWS_PER_BATCH, row_groups=[group], columns=needed)
            try:
                for batch in batches:
                    yield from _rows_of(path, number, batch, tally)
                    number += batch.num_rows
            except (arrow_error, OSError) as error:
                cause = str(error).partition("\n")[0]
                fault = f"{path}:row {number}: row group {group} is damaged from here on ({cause})"
                tally.broken(RunError(f"{fault}; write the file anew"), end - number)
                number = end


def _arrow_rows(path: Path, tally: Tally) -> Iterator[Row]:
    """A stream of record batches, as `datasets` keeps and saves its data."""
    arrow_error = resolve("error", _ARROW, "data.prompts")
    open_stream = resolve("open_stream", _ARROW, "data.prompts")
    memory_map = resolve("memory_map", _ARROW, "data.prompts")
    number = 0
    try:
        with memory_map(str(path)) as mapped, open_stream(mapped) as batches:
            needed = _needed(path, batches.schema.names, tally.data)
            for batch in batches:
                yield from _rows_of(path, number, batch.select(needed), tally)
                number += batch.num_rows
    except (arrow_error, OSError) as error:
        raise RunError(f"{path}:row {number}: not a stream of Arrow ({error})") from error


def _needed(path: Path, names: list[str], data: DataConfig) -> list[str]:
    """The columns that the keys may lead into; all, where one leads nowhere.

    Raises RunError for a column that the file has twice.
    """
    needed: set[str] = set()
    for key in (data.prompt_key, data.label_key, data.metadata_key):
        found = {name for name in names if key == name or key.startswith(f"{name}.")}
        if key and not found and key != DataConfig.metadata_key:
            return names
        needed |= found
    for name in needed:
        if names.count(name) > 1:
            raise RunError(f"{path} has the column {name!r} twice; write it with one of them")
    return sorted(needed)


def _rows_of(path: Path, first: int, batch: Any, tally: Tally) -> Iterator[Row]:
    """The rows of an Arrow batch; where one cannot be read, the others are."""
    try:
        rows = batch.to_pylist(maps_as_pydicts="lossy")
    except (ValueError, OverflowError):
        rows = None
    for i in range(batch.num_rows):
        place = f"{path}:row {first + i}"
        try:
            fields = rows[i] if rows else batch.slice(i, 1).to_pylist(maps_as_pydicts="lossy")[0]
        except UnicodeDecodeError as error:
            fault = f"{place}: a text is not UTF-8 ({error.reason}); write the file anew"
            tally.broken(RunError(fault))
            continue
        except (ValueError, OverflowError) as error:
            # Dates beyond those of Python, names that a struct has twice.
            tally.broken(RunError(f"{place}: a value cannot be read ({error})"))
            continue
        yield Row(place, fields)
