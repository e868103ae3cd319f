"""Prompt files, JSONL and parquet: their records, and one line for each way to be bad."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanoslime.storage.prompt_files import PromptRecord, check_prompt_file, read_prompt_file
from nanoslime.types import RunError


def read(path: Path) -> list[PromptRecord]:
    return list(read_prompt_file(path, "prompt", "label"))


def test_records_of_jsonl_know_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a's; file.jsonl"
    path.write_text('\n{"prompt": "a", "label": 1}\n\n{"prompt": ["b"], "label": 2, "more": {}}')
    assert read(path) == [
        PromptRecord(f"{path}:2", {"prompt": "a", "label": 1}),
        PromptRecord(f"{path}:4", {"prompt": ["b"], "label": 2, "more": {}}),
    ]


def test_records_of_parquet_know_their_row(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(
        pa.table({"prompt": ["a", "b", "c"], "label": [1, 2, 3]}), path, row_group_size=2
    )
    records = read(path)
    assert [record.place for record in records] == [f"{path}:row {i}" for i in range(3)]
    assert records[2].fields == {"prompt": "c", "label": 3}


def test_no_label_is_needed_where_no_key_names_one(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}')
    assert len(list(read_prompt_file(path, "prompt", ""))) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", None, "p.jsonl does not exist; set data.prompts or data.eval_prompts"),
        ("p.txt", b"{}", "p.txt: choose a file that ends in .jsonl or .parquet"),
        ("p.jsonl", b"", "p.jsonl holds no prompts"),
        ("p.jsonl", b"\n \n", "p.jsonl holds no prompts"),
        ("p.jsonl", b"\n{broken", r"p.jsonl:2: not a line of JSON \(.*\): '{broken'"),
        ("p.jsonl", b"\xff", r"p.jsonl:1: not a line of JSON \(.*\): "),
        ("p.jsonl", b"[1]", "p.jsonl:1: a JSON object is needed, found list"),
        (
            "p.jsonl",
            b'{"question": 1, "answer": 2}',
            "p.jsonl:1: no key 'prompt'; set data.prompt_key to one of answer, question",
        ),
        (
            "p.jsonl",
            b'{"prompt": 1, "answer": 2}',
            "p.jsonl:1: no key 'label'; set data.label_key to one of answer, prompt",
        ),
        ("p.parquet", b"PAR1", "p.parquet is not a readable parquet file: "),
    ],
)
def test_login_node_and_loader_refuse_with_the_same_line(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunError, match=message) as by_loader:
        read(path)
    with pytest.raises(RunError, match=message) as on_login_node:
        check_prompt_file(path, "prompt", "label")
    assert str(by_loader.value) == str(on_login_node.value)
    assert "\n" not in str(by_loader.value)


def test_parquet_without_a_key_or_without_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"prompt": ["a"], "answer": [1]}), path)
    with pytest.raises(
        RunError, match="p.parquet:row 0: no key 'label'; set data.label_key to one"
    ):
        check_prompt_file(path, "prompt", "label")
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    with pytest.raises(RunError, match="p.parquet holds no prompts"):
        check_prompt_file(path, "prompt", "label")


def test_the_check_looks_at_the_first_prompt_only(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "label": 1}\n{broken\n')
    check_prompt_file(path, "prompt", "label")
    with pytest.raises(RunError, match="p.jsonl:2: not a line of JSON"):
        read(path)
