"""Prompts by file, directory or hub id: the files of a split are found, or the choices named."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanoslime.config import RunConfig
from nanoslime.storage.datasets import prompt_files, with_local_prompts
from nanoslime.storage.prompt_files import read_prompts
from nanoslime.types import RunError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = COMMIT[::-1]
# As openai/gsm8k has it.
CARD = """---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: socratic
  data_files:
  - split: train
    path: ["socratic/train-*"]
---
# A data set
"""
PARTS = [
    "main/train-00000-of-00002.parquet",
    "main/train-00001-of-00002.parquet",
    "main/test-00000-of-00001.parquet",
    "socratic/train-00000-of-00001.parquet",
]


def write(directory: Path, *names: str) -> Path:
    """Each file has one prompt, its own name."""
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = pa.table({"prompt": [name], "label": [1]})
        if path.suffix == ".parquet":
            pq.write_table(rows, path)
        elif path.suffix == ".arrow":
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, rows.schema) as out:
                out.write_table(rows)
        else:
            line = json.dumps({"prompt": name, "label": 1}).encode()
            path.write_bytes(gzip.compress(line) if path.suffix == ".gz" else line)
    return directory


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a hub without a network, with one data set in it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    dataset = tmp_path / "hub" / "datasets--someone--math.v1"
    (dataset / "refs").mkdir(parents=True)
    (dataset / "refs" / "main").write_text(COMMIT)
    snapshot = write(dataset / "snapshots" / COMMIT, *PARTS)
    (snapshot / "README.md").write_text(CARD)
    write(dataset / "snapshots" / OTHER_COMMIT, "train.jsonl")
    return snapshot


def prompts_of(name: str, **eval_prompts: str) -> list[str]:
    """The prompts of the local place that a name stands for."""
    config = with_local_prompts(RunConfig(data={"prompts": name, **eval_prompts}))
    return [str(record.prompt) for record in read_prompts(Path(config.data.prompts), config.data)]


def test_a_data_set_of_the_hub_becomes_a_split_of_its_snapshot(hub: Path) -> None:
    data = {
        "prompts": "someone/math.v1:main/train",
        "eval_prompts": "someone/math.v1:main/test",
    }
    config = with_local_prompts(RunConfig(data=data))
    assert config.data.prompts == f"{hub}:main/train"
    assert config.data.eval_prompts == f"{hub}:main/test"
    assert with_local_prompts(config) == config
    assert prompts_of("someone/math.v1:main/train") == PARTS[:2]
    assert prompts_of("someone/math.v1:main") == PARTS[:2]
    assert prompts_of("someone/math.v1:socratic/train") == PARTS[3:]
    assert prompts_of(f"someone/math.v1@{OTHER_COMMIT}") == ["train.jsonl"]


def test_a_source_keeps_its_name_when_it_becomes_a_path(hub: Path) -> None:
    sources = [{"prompts": "someone/math.v1:main/train"}, {"prompts": "a/own.jsonl"}]
    config = with_local_prompts(RunConfig(data={"sources": sources}))
    assert list(config.data.by_source()) == ["math", "own"]
    assert config.data.sources[0].prompts == f"{hub}:main/train"
    assert Path(config.data.sources[1].prompts).is_absolute()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("someone/nothing", "data.prompts='someone/nothing' is no directory, and the hub did not"),
        ("someone/nothing.jsonl", "someone/nothing.jsonl does not exist; set data.prompts"),
        ("/nowhere/at/all", "/nowhere/at/all does not exist; set data.prompts"),
        ("https://a.org/b.jsonl", "does not exist; set data.prompts"),
        ("someone/math.v1", "has no configuration ''; name one .*; there are main, socratic"),
        ("someone/math.v1:other/train", "has no configuration 'other'; .* are main, socratic"),
        ("someone/math.v1:main/dev", "has no split 'dev'; name one .*; there are train, test"),
        (f"someone/math.v1@{OTHER_COMMIT}:dev", "no file of .* is of this split; .* train.jsonl"),
    ],
)
def test_a_name_that_leads_to_no_prompts_is_refused(hub: Path, name: str, says: str) -> None:
    with pytest.raises(RunError, match=says) as refused:
        prompts_of(name)
    assert "\n" not in str(refused.value)


def test_a_split_that_is_not_whole_is_refused(hub: Path) -> None:
    (hub / PARTS[1]).unlink()
    with pytest.raises(RunError, match="has 1 of the 2 files main/train-.*; fetch it anew"):
        prompts_of("someone/math.v1:main/train")


def test_evaluation_on_the_training_split_is_refused(hub: Path) -> None:
    name = "someone/math.v1:main/train"
    with pytest.raises(RunError, match="evaluation set held_out: .* is what is trained on; name a"):
        prompts_of(name, eval_prompts=name)


@pytest.mark.parametrize(
    ("files", "split", "found"),
    [
        # `datasets` saves a DatasetDict and a Dataset, and keeps a cache so.
        (["train/data-00000-of-00001.arrow", "test/data-00000-of-00001.arrow"], "", [0]),
        (["train/data-00000-of-00001.arrow", "test/data-00000-of-00001.arrow"], ":test", [1]),
        (["data-00000-of-00001.arrow", "cache-39f.arrow", "state.json"], "", [0]),
        (["a/0.0.0/9ab/math-train.arrow", "a/0.0.0/9ab/math-test.arrow"], ":train", [0]),
        # Files as people name them.
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], "", [0]),
        (["b.jsonl", "c.jsonl", "c_test.jsonl", ".d.jsonl"], "", [0, 1]),
        (["a_validation.jsonl.gz", "train.jsonl.gz"], ":validation", [0]),
        (["main/train.jsonl", "other/train.jsonl"], ":other/train", [1]),
        (["constraints.jsonl", "train.jsonl"], ":train", [1]),
    ],
)
def test_the_files_of_a_split_are_told_by_their_names(
    tmp_path: Path, files: list[str], split: str, found: list[int]
) -> None:
    directory = write(tmp_path / "it's: a; set", *files)
    expected = [files[i] for i in found]
    read = prompts_of(f"{directory}{split}")
    assert read == expected


def test_a_directory_with_the_rows_in_two_forms_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", "train.parquet")
    with pytest.raises(RunError, match="files of several kinds, .jsonl and .parquet, which may be"):
        prompt_files(tmp_path)


@pytest.mark.parametrize(
    ("card", "says"),
    [("---\na: [\n---\n", "the head of the card is not YAML"), ("no head\n---\nx\n---\n", None)],
)
def test_a_card_is_read_only_where_it_has_a_head(
    tmp_path: Path, card: str, says: str | None
) -> None:
    write(tmp_path, "train.jsonl")
    (tmp_path / "README.md").write_text(card)
    if says is None:
        assert prompt_files(tmp_path) == [tmp_path / "train.jsonl"]
    else:
        with pytest.raises(RunError, match=says):
            prompt_files(tmp_path)
