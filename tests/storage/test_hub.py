"""A checkpoint by directory or hub id: found, or refused in one line."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects

from nanoslime.storage.hub import LocalCheckpoint, find_checkpoint
from nanoslime.types import RunError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_checkpoint(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "tokenizer.json").write_text("{}")
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(8)
    (directory / "model.safetensors").write_bytes(content)
    return directory


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache without a network, as HF_HUB_CACHE and HF_HUB_OFFLINE make it."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return cache


def snapshot_of_main(hub: Path) -> Path:
    """Where the cache holds the commit that is the head of someone/tiny."""
    model = hub / "models--someone--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    return model / "snapshots" / COMMIT


def find(name: str, revision: str = "") -> LocalCheckpoint:
    return find_checkpoint(name, revision, download=True)


def test_a_directory_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_checkpoint(tmp_path / "it's a model")
    monkeypatch.chdir(tmp_path)
    assert find("it's a model") == LocalCheckpoint(directory, "", is_whole=True)


def test_a_hub_id_becomes_its_snapshot_and_its_commit(hub: Path) -> None:
    snapshot = write_checkpoint(snapshot_of_main(hub))
    assert find("someone/tiny") == LocalCheckpoint(snapshot, COMMIT, is_whole=True)
    assert find("someone/tiny", COMMIT) == LocalCheckpoint(snapshot, COMMIT, is_whole=True)


def test_a_plan_needs_no_weights_of_a_hub_id(hub: Path) -> None:
    snapshot = snapshot_of_main(hub)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    found = find_checkpoint("someone/tiny", "", download=False)
    assert found == LocalCheckpoint(snapshot, COMMIT, is_whole=False)
    with pytest.raises(RunError, match="holds neither model.safetensors nor"):
        find("someone/tiny")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "model.hf_checkpoint is not set: give --hf-checkpoint a directory or a hub id"),
        ("/nowhere/at/all", "'/nowhere/at/all' is neither a directory nor a hub id"),
        (
            "someone/nothing",
            "model.hf_checkpoint='someone/nothing' is no directory, and the hub did not give it ",
        ),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(hub: Path, name: str, message: str) -> None:
    with pytest.raises(RunError) as error:
        find(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_makers_copy_of_the_weights_is_not_fetched_but_code_and_tokenizers_are(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = write_checkpoint(snapshot_of_main(hub))
    asked = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    find("someone/tiny")
    files = [
        "config.json",
        "tiktoken.model",
        "tokenization_moonshot.py",
        "sub/chat_template.jinja",
        "model-00001-of-00002.safetensors",
        "consolidated.safetensors",
        "original/consolidated.00.pth",
        "pytorch_model.bin",
    ]
    allowed = filter_repo_objects(
        files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(allowed) == files[:5]
