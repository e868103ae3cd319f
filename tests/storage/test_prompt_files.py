"""Prompt files, JSONL and parquet: their records, and one line for each way to be bad."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanoslime.config import DataConfig
from nanoslime.storage.prompt_files import PromptRecord, read_prompts
from nanoslime.types import RunError

# A row of DAPO-Math-17k.
DAPO = {
    "prompt": [{"content": "What is 6 x 7?", "role": "user"}],
    "reward_model": {"ground_truth": "42", "style": "rule-lighteval/MATH_v2"},
    "extra_info": {"index": "9a9b"},
}
USER = {"role": "user", "content": "u"}


def read(path: Path, **data: Any) -> list[PromptRecord]:
    return list(read_prompts(path, DataConfig(**data)))


def write(directory: Path, rows: list[dict[str, Any]], suffix: str) -> Path:
    path = directory / f"p.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_records_of_jsonl_know_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a's; file.jsonl"
    path.write_text('\n{"prompt": "a", "label": 1}\n\n{"prompt": "b", "label": "c", "more": {}}')
    assert read(path) == [
        PromptRecord(f"{path}:2", "a", 1, {}),
        PromptRecord(f"{path}:4", "b", "c", {}),
    ]


def test_records_of_parquet_know_their_row(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(
        pa.table({"prompt": ["a", "b", "c"], "label": [1, 2, 3]}), path, row_group_size=2
    )
    records = read(path)
    assert [record.place for record in records] == [f"{path}:row {i}" for i in range(3)]
    assert (records[2].prompt, records[2].label) == ("c", 3)


def test_no_label_is_needed_where_no_key_names_one(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}')
    assert read(path, label_key="") == [PromptRecord(f"{path}:1", "a", None, {})]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_dot_leads_into_structs_and_lists(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path, [DAPO], suffix)
    keys = {"label_key": "reward_model.ground_truth", "metadata_key": "extra_info"}
    (record,) = read(path, **keys)
    assert record.prompt == DAPO["prompt"]
    assert record.label == "42"
    assert record.metadata == {"index": "9a9b"}
    (text,) = read(path, prompt_key="prompt.0.content", **keys)
    assert text.prompt == "What is 6 x 7?"


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_name_with_a_dot_in_it_goes_first(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path, [{**DAPO, "reward_model.ground_truth": "other"}], suffix)
    (record,) = read(path, label_key="reward_model.ground_truth")
    assert record.label == "other"


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("changes", "data", "message"),
    [
        (
            {},
            {"label_key": "reward_model"},
            "the label {'ground_truth': '42', .* is neither a text nor a number; set "
            "data.label_key to reward_model.ground_truth or reward_model.style",
        ),
        (
            {},
            {"label_key": "reward_model.truth"},
            "no key 'reward_model.truth'; set data.label_key to one of .*prompt, "
            "reward_model.ground_truth, reward_model.style",
        ),
        ({}, {"prompt_key": "prompt.1.content"}, "no key 'prompt.1.content'; set data.prompt_key"),
        ({}, {"metadata_key": "more"}, "no key 'more'; set data.metadata_key to one of"),
        ({"label": ["42"]}, {}, "the label .'42'. is .*; set data.label_key to label.0 for its"),
        ({"label": None}, {}, "the label None is neither a text nor a number; write one, or set"),
        ({"label": float("nan")}, {}, "the label nan is neither"),
        ({"label": float("inf")}, {}, "the label inf is neither"),
        ({"label": 1, "metadata": "a source"}, {}, "metadata is 'a source', not an object or its"),
        ({"label": 1, "metadata": [1]}, {}, r"metadata is \[1\], not an object"),
        ({"label": 1, "prompt": 5}, {}, "a prompt is a string or a list of .* messages, not 5"),
        ({"label": 1, "prompt": None}, {}, "a prompt is a string or a list of .*, not None"),
        ({"label": 1, "prompt": ""}, {}, "the prompt is empty"),
        ({"label": 1, "prompt": []}, {}, "the prompt has no messages"),
        (
            {"label": 1, "prompt": [{"text": "a"}]},
            {},
            "a prompt is a string or a list .*, but one of them is {'text': 'a'}",
        ),
        (
            {"label": 1, "prompt": [{"role": "user", "content": None}]},
            {},
            ".*; the content of a user message is None, not text or parts of text",
        ),
        (
            {"label": 1, "prompt": [{"role": "user", "content": [{"type": "image"}]}]},
            {},
            ".*; the content of a user message is .*, not text or parts of text",
        ),
        (
            {"label": 1, "prompt": [{"role": "system", "content": "s"}, USER]},
            {"system_prompt": "x"},
            "the prompt has a system message of its own, and data.system_prompt is set",
        ),
    ],
)
def test_a_bad_row_is_refused_with_its_place(
    tmp_path: Path, suffix: str, changes: dict, data: dict, message: str
) -> None:
    good = {**DAPO, "prompt": [USER], "label": 1, "metadata": None}
    path = write(tmp_path, [{**DAPO, **changes}], suffix)
    if "label_key" not in data and not changes:
        data = {"label_key": "reward_model.ground_truth", **data}
    place = {"jsonl": r"p.jsonl:1: ", "parquet": r"p.parquet:row 0: "}[suffix]
    with pytest.raises(RunError, match=place + message) as refused:
        read(path, **data)
    assert "\n" not in str(refused.value)
    if suffix == "jsonl" and not data:
        # Later rows are looked at, too.
        with pytest.raises(RunError, match="p.jsonl:2: " + message):
            read(write(tmp_path, [good, {**DAPO, **changes}], suffix))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_what_is_meant_as_text_is_taken_as_text(tmp_path: Path, suffix: str) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    calls = [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]
    rows = [
        {"prompt": [{"role": "user", "content": parts}], "label": 1, "metadata": '{"k": 2}'},
        {"prompt": [{"role": "user", "content": parts[:1]}], "label": 2, "metadata": None},
    ]
    first, second = read(write(tmp_path, rows, suffix))
    assert first.prompt == [{"role": "user", "content": "ab"}]
    assert first.metadata == {"k": 2}
    assert second.prompt == [{"role": "user", "content": "a"}]
    assert second.metadata == {}
    (record,) = read(write(tmp_path, [{"prompt": calls, "label": 1}], suffix))
    assert record.prompt == [{**calls[0], "content": ""}]


def test_a_message_of_parquet_has_no_keys_that_it_had_not(tmp_path: Path) -> None:
    messages = [{**USER, "name": "n"}, {"role": "assistant", "content": "b"}, USER]
    (record,) = read(write(tmp_path, [{"prompt": messages, "label": 1}], "parquet"))
    assert record.prompt == messages


def test_a_map_of_parquet_is_an_object(tmp_path: Path) -> None:
    pairs = pa.array([[("k", "v"), ("l", "w")]], pa.map_(pa.string(), pa.string()))
    pq.write_table(
        pa.table({"prompt": ["a"], "label": [1], "metadata": pairs}), tmp_path / "p.parquet"
    )
    assert read(tmp_path / "p.parquet")[0].metadata == {"k": "v", "l": "w"}


def test_a_decimal_label_is_a_number(tmp_path: Path) -> None:
    (record,) = read(write(tmp_path, [{"prompt": "a", "label": Decimal("3.50")}], "parquet"))
    assert record.label == "3.50"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", None, "p.jsonl does not exist; set data.prompts or data.eval_prompts"),
        ("p.txt", b"{}", "p.txt: choose a file that ends in .jsonl or .parquet"),
        ("p.jsonl", b"", "p.jsonl holds no prompts"),
        ("p.jsonl", b"\n \n", "p.jsonl holds no prompts"),
        ("p.jsonl", b"\n{broken", r"p.jsonl:2: not a line of JSON \(.*\): '{broken'"),
        ("p.jsonl", b"[" * 100_000, r"p.jsonl:1: not a line of JSON \(.*\): "),
        (
            "p.jsonl",
            '{"prompt": "a", "label": 1}\n{"prompt": "é", "label": 1}'.encode("latin-1"),
            r"p.jsonl:2: not a line of JSON \(not UTF-8, byte 0xe9: invalid .*\): convert the file",
        ),
        (
            "p.jsonl",
            '{"prompt": "a"}\n'.encode("utf-16"),
            r"p.jsonl:1: not a line of JSON \(not UTF",
        ),
        (
            "p.jsonl",
            rb'{"prompt": "\ud800", "label": 1}',
            r"p.jsonl:1: \\ud800 is half of a surrogate pair and no character; remove it",
        ),
        ("p.jsonl", rb'{"prompt": "a", "label": "x\uDFFF"}', r"p.jsonl:1: \\udfff is half"),
        (
            "p.jsonl",
            b'{"prompt": "a\xed\xa0\x80", "label": 1}',
            r"p.jsonl:1: not a line of JSON \(not UTF-8, byte 0xed",
        ),
        (
            "p.jsonl",
            rb'{"prompt": "a", "label": 1, "metadata": "{\"k\": \"\\ud800\"}"}',
            "p.jsonl:1: metadata is .* not an object or its JSON text",
        ),
        (
            "p.jsonl",
            b'{"prompt": "a", "label": 1, "metadata": "' + b"[" * 100_000 + b'"}',
            r"p.jsonl:1: metadata is .* not an object or its JSON text",
        ),
        ("p.jsonl", b"[1]", "p.jsonl:1: a JSON object is needed, found list"),
        (
            "p.jsonl",
            b'{"question": 1, "answer": 2}',
            "p.jsonl:1: no key 'prompt'; set data.prompt_key to one of answer, question",
        ),
        ("p.parquet", b"PAR1", "p.parquet is not a readable parquet file: "),
        ("p.parquet", b'{"prompt": "a"}', "p.parquet is not a readable parquet file: "),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunError, match=message) as refused:
        read(path)
    assert "\n" not in str(refused.value)


def test_a_pair_of_surrogates_and_a_byte_order_mark_are_text(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + rb'{"prompt": "\ud83d\ude00", "label": 1}')
    assert read(path)[0].prompt == "\U0001f600"


def test_a_parquet_file_that_is_cut_short_or_damaged_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}" * 50, "label": i} for i in range(3000)]
    path = write(tmp_path, rows, "parquet")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match="p.parquet is not a readable parquet file: "):
        read(path)
    path.write_bytes(whole[:500] + bytes(300) + whole[800:])
    with pytest.raises(RunError, match="p.parquet:row 0: row group 0 is damaged from here on .Cor"):
        read(path)


def test_a_text_of_parquet_that_is_not_utf8_is_refused_with_its_row(tmp_path: Path) -> None:
    offsets = pa.array([0, 1, 2], pa.int32()).buffers()[1]
    texts = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"a\xff"))
    pq.write_table(pa.table({"prompt": texts, "label": [1, 2]}), tmp_path / "p.parquet")
    with pytest.raises(RunError, match="p.parquet:row 1: a text is not UTF-8"):
        read(tmp_path / "p.parquet")


def test_parquet_without_a_key_or_without_rows_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, [{"prompt": "a", "answer": 1}], "parquet")
    with pytest.raises(
        RunError, match="p.parquet:row 0: no key 'label'; set data.label_key to one of answer, pro"
    ):
        read(path)
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    with pytest.raises(RunError, match="p.parquet holds no prompts"):
        read(path)
