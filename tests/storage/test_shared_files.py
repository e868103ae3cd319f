"""Files between nodes: whole or absent for a reader, patience with a deadline."""

import os
import threading
from pathlib import Path

import pytest

from nanoslime.storage.shared_files import publish, publish_json, read_json
from nanoslime.types import RunError


def test_publish_replaces_and_leaves_nothing_aside(tmp_path: Path) -> None:
    publish(tmp_path / "token", b"one", mode=0o600)
    publish(tmp_path / "token", b"two", mode=0o600)
    assert (tmp_path / "token").read_bytes() == b"two"
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["token"]


def test_a_half_written_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    path.write_text('{"step": ')
    writer = threading.Timer(0.3, lambda: publish_json(path, {"step": 3}))
    writer.start()
    assert read_json(path) == {"step": 3}
    writer.join()


def test_a_file_that_stays_broken_is_named(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"step": ')
    with pytest.raises(RunError, match="status.json is still not JSON after 0.2 s"):
        read_json(tmp_path / "status.json", deadline_s=0.2)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "absent.json")
