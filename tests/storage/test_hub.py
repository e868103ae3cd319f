"""A checkpoint by directory or hub id: found and made sure of, or refused in one line."""

import json
import struct
from pathlib import Path

import pytest

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


def find(name: str, revision: str = "", needs_tokenizer: bool = True) -> LocalCheckpoint:
    return find_checkpoint(name, revision, download=True, needs_tokenizer=needs_tokenizer)


def test_a_directory_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_checkpoint(tmp_path / "it's a model")
    monkeypatch.chdir(tmp_path)
    assert find("it's a model") == LocalCheckpoint(directory, "")


def test_a_hub_id_becomes_its_snapshot_and_its_commit(hub: Path) -> None:
    snapshot = write_checkpoint(snapshot_of_main(hub))
    assert find("someone/tiny") == LocalCheckpoint(snapshot, COMMIT)


def test_a_plan_needs_no_weights_of_a_hub_id(hub: Path) -> None:
    snapshot = snapshot_of_main(hub)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    found = find_checkpoint("someone/tiny", "", download=False, needs_tokenizer=True)
    assert found == LocalCheckpoint(snapshot, COMMIT)
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


def test_a_tokenizer_is_needed_unless_rollouts_are_replayed(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")
    (directory / "tokenizer.json").unlink()
    assert find(str(directory), needs_tokenizer=False).directory == directory
    with pytest.raises(RunError, match="holds no tokenizer: none of tokenizer.json"):
        find(str(directory))
