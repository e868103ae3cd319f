"""Prompt files, JSONL and parquet: their records, and one line for each way to be bad."""

import datetime
import gzip
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanoslime.config import DataConfig
from nanoslime.plugins import resolve
from nanoslime.rollout.rewards import REWARDS
from nanoslime.storage.prompt_files import PromptRecord, read_prompts
from nanoslime.storage.prompt_rows import Tally
from nanoslime.types import RunError
from tools.submit.prompts import check_prompts

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
        (
            {"label": ["42"]},
            {"reward": "gsm8k"},
            "the label .'42'. is .*; set data.label_key to label.0 for its",
        ),
        ({"label": []}, {}, "the label .. is neither a text nor a number"),
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
        ("p.json", b'[\n {"prompt": "a"}\n]', r"p.json:1: .*'\['; write one object a line \(jq -c"),
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


def write_bytes(directory: Path, name: str, content: bytes) -> Path:
    path = directory / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt": "a", "label": 1}\r\n\r\n{"prompt": "b", "label": 2}\r\n',
        b'\xef\xbb\xbf{"prompt": "a", "label": 1}\n \xef\xbb\xbf\n{"prompt": "b", "label": 2}',
        b'{"prompt": "a", "label": 1}\n\xef\xbb\xbf{"prompt": "b", "label": 2}',
    ],
    ids=["crlf", "bom", "bom of a second file"],
)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "jsonl.gz", "jsonl.zst"])
def test_lines_end_and_begin_and_are_compressed_as_they_like(
    tmp_path: Path, content: bytes, suffix: str
) -> None:
    # Two members or frames, as compressors that work in parallel write them.
    halves = (content[:20], content[20:])
    if suffix.endswith("gz"):
        content = b"".join(gzip.compress(half) for half in halves)
    if suffix.endswith("zst"):
        content = b"".join(bytes(pa.compress(half, "zstd", asbytes=True)) for half in halves)
    path = write_bytes(tmp_path, f"p.{suffix}", content)
    assert [(record.prompt, record.label) for record in read(path)] == [("a", 1), ("b", 2)]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_compressed_file_that_is_cut_short_is_refused(tmp_path: Path, suffix: str) -> None:
    lines = b"".join(b'{"prompt": "%d", "label": 1}\n' % i for i in range(999))
    whole = {"gz": gzip.compress(lines), "zst": pa.compress(lines, "zstd", asbytes=True)}[suffix]
    path = write_bytes(tmp_path, f"p.jsonl.{suffix}", whole[:-9])
    for broken in ("error", "skip"):
        with pytest.raises(RunError, match=f"p.jsonl.{suffix} cannot be read: Truncated"):
            read(path, broken=broken)
    path.write_bytes(b"not compressed")
    with pytest.raises(RunError, match=f"p.jsonl.{suffix} cannot be read: "):
        read(path)


def test_a_long_line_and_a_line_separator_of_unicode_are_one_row(tmp_path: Path) -> None:
    prompt = "x" * 5_000_000 + "\u2028\x85y"
    line = json.dumps({"prompt": prompt, "label": 1}, ensure_ascii=False).encode()
    (record,) = read(write_bytes(tmp_path, "p.jsonl", line + b"\n"))
    assert record.prompt == prompt
    with pytest.raises(RunError) as refused:
        read(write_bytes(tmp_path, "p.jsonl", line[:-2]))
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_json_texts_are_what_they_hold(tmp_path: Path, suffix: str) -> None:
    """Some data sets have structs and messages as their JSON."""
    row = {"prompt": json.dumps([USER]), "reward_model": '{"truth": ["4", "5"]}'}
    (record,) = read(write(tmp_path, [row], suffix), label_key="reward_model.truth.1")
    assert (record.prompt, record.label) == ([USER], "5")


@pytest.mark.parametrize("prompt", ["[1, 2] has which sum?", "[1, 2]", '["a"]', '[{"a": 1}]', "[]"])
def test_a_text_that_is_no_messages_stays_a_text(tmp_path: Path, prompt: str) -> None:
    (record,) = read(write(tmp_path, [{"prompt": prompt, "label": 1}], "jsonl"))
    assert record.prompt == prompt


@pytest.mark.parametrize("label", [0, -5, 10**400, 2**64 - 1, 1.5, True, "", "é", "e\u0301"])
def test_labels_are_kept_as_they_are(tmp_path: Path, label: Any) -> None:
    (record,) = read(write(tmp_path, [{"prompt": "e\u0301", "label": label}], "jsonl"))
    assert (record.prompt, record.label) == ("e\u0301", label)
    assert type(record.label) is type(label)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_any_of_several_labels_may_be_right(tmp_path: Path, suffix: str) -> None:
    row = {"prompt": "Who?", "answers": {"text": ["Ann Lee", "A. Lee"]}}
    path = write(tmp_path, [row, row], suffix)
    for reward in ("exact_match", "f1"):
        data = DataConfig(label_key="answers.text", reward=reward, deduplicate=True)
        assert check_prompts(path, data, None).num_used == 1
        (record, _) = read_prompts(path, data)
        assert record.label == ("Ann Lee", "A. Lee")
        judge = resolve(reward, REWARDS, "data.reward")
        assert judge("A. Lee", record.label, {}) == 1.0
        assert judge("Bob", record.label, {}) == 0.0


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (b'{"prompt": "a", "prompt": "b", "label": 1}', "the key 'prompt' stands twice"),
        (b'{"prompt": "a", "label": 1, "metadata": {"k": 1, "k": 2}}', "the key 'k' stands twice"),
        (b'{"prompt": "a", "label": ' + b"9" * 5000 + b"}", r"not a line of JSON \(Exceeds the"),
        (b'{"prompt": "a", "label": NaN}', "the label nan is neither"),
        (b'{"prompt": "a", "label": 1e999}', "the label inf is neither"),
        (rb'{"prompt": " \n", "label": 1}', "the prompt is empty"),
        (
            b'{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": " "}],'
            b'"label": 1}',
            "the prompt is empty: its messages have no text",
        ),
        (
            b'{"prompt": [{"role": "user", "content": [{"type": "image_url", "text": "t"}]}],'
            b'"label": 1}',
            "the content of a user message is .*, not text or parts of text",
        ),
        (b"\0" * 9, "not a line of JSON"),
    ],
)
def test_a_row_that_may_mean_two_things_or_nothing_is_refused(
    tmp_path: Path, row: bytes, says: str
) -> None:
    with pytest.raises(RunError, match=f"p.jsonl:1: .*{says}") as refused:
        read(write_bytes(tmp_path, "p.jsonl", row))
    assert "\n" not in str(refused.value)


def test_calls_of_tools_and_their_answers_are_messages(tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    answer = {"role": "tool", "tool_call_id": "1", "content": "4"}
    (record,) = read(write(tmp_path, [{"prompt": [USER, call, answer], "label": 1}], "jsonl"))
    assert record.prompt == [USER, {**call, "content": ""}, answer]


def test_columns_of_any_kind_of_text_and_dates_in_metadata_are_read(tmp_path: Path) -> None:
    day = datetime.date(2026, 1, 2)
    columns = {
        "prompt": pa.array(["a", "b", "a"]).dictionary_encode(),
        "label": pa.array(["1", "2", "3"], pa.large_string()),
        "metadata": pa.array([{"day": day, "more": {"k": [1]}}] * 3),
    }
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    records = read(tmp_path / "p.parquet")
    assert [(record.prompt, record.label) for record in records] == [
        ("a", "1"),
        ("b", "2"),
        ("a", "3"),
    ]
    assert json.loads(json.dumps(records[0].metadata)) == {"day": str(day), "more": {"k": [1]}}


def test_a_column_that_stands_twice_is_refused_where_it_is_read(tmp_path: Path) -> None:
    arrays = [pa.array([name]) for name in ("a", "b", "c", "d")]
    path = tmp_path / "p.parquet"
    pq.write_table(pa.Table.from_arrays(arrays, ["prompt", "label", "other", "other"]), path)
    assert read(path)[0].label == "b"
    pq.write_table(pa.Table.from_arrays(arrays, ["prompt", "prompt", "label", "other"]), path)
    with pytest.raises(RunError, match="p.parquet has the column 'prompt' twice"):
        read(path)


BROKEN_LINES = [
    (b"{broken", "not a line of JSON"),
    (b"[1]", "a JSON object is needed, found list"),
    (b'{"label": 1}', "no key 'prompt'"),
    (b'{"prompt": 5, "label": 1}', "a prompt is a string or a list"),
    (b'{"prompt": "", "label": 1}', "the prompt is empty"),
    (b'{"prompt": "\xe9", "label": 1}', "not UTF-8"),
    (b'{"prompt": "a", "label": null}', "the label None"),
    (b'{"prompt": "a", "label": 1, "metadata": 5}', "metadata is 5"),
]


@pytest.mark.parametrize(("line", "says"), BROKEN_LINES)
def test_a_broken_line_is_left_out_and_counted_where_asked(
    tmp_path: Path, line: bytes, says: str
) -> None:
    good = b'{"prompt": "%d", "label": 1}'
    path = write_bytes(tmp_path, "p.jsonl", b"\n".join([good % 1, line, b"", line, good % 2]))
    data = DataConfig(broken="skip")
    tally = Tally(data)
    assert [record.prompt for record in read_prompts(path, data, tally)] == ["1", "2"]
    assert tally.num_broken == 2
    assert tally.first_fault.startswith(f"{path}:2: ")
    assert says in tally.first_fault
    with pytest.raises(RunError) as refused:
        read(path)
    assert str(refused.value) == tally.first_fault
    path.write_bytes(line)
    with pytest.raises(RunError, match=f"p.jsonl: each of 1 rows is broken: .*p.jsonl:1: .*{says}"):
        read(path, broken="skip")


def test_a_damaged_row_group_and_texts_that_are_no_utf8_are_left_out_and_counted(
    tmp_path: Path,
) -> None:
    path = write(tmp_path, [{"prompt": f"{i}" * 50, "label": i} for i in range(3000)], "parquet")
    pq.write_table(pq.read_table(path), path, row_group_size=1000)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + 50 : column.data_page_offset + 350] = bytes(300)
    path.write_bytes(content)
    data = DataConfig(broken="skip")
    tally = Tally(data)
    labels = [record.label for record in read_prompts(path, data, tally)]
    assert labels == [*range(1000), *range(2000, 3000)]
    assert tally.num_broken == 1000
    assert "p.parquet:row 1000: row group 1 is damaged from here on" in tally.first_fault

    offsets = pa.array([0, 1, 2, 3], pa.int32()).buffers()[1]
    texts = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"a\xffc"))
    pq.write_table(pa.table({"prompt": texts, "label": [1, 2, 3]}), path)
    tally = Tally(data)
    assert [record.label for record in read_prompts(path, data, tally)] == [1, 3]
    assert (tally.num_broken, "row 1: a text is not UTF-8" in tally.first_fault) == (1, True)


def test_a_stream_of_arrow_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    rows = pa.table({"prompt": ["a" * 99] * 99, "label": [1] * 99})
    path = tmp_path / "p.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, rows.schema) as stream:
        stream.write_table(rows)
    assert len(read(path)) == 99
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(RunError, match="p.arrow:row 0: not a stream of Arrow"):
        read(path)
