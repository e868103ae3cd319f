"""Files between nodes: whole or absent for a reader, patience with a deadline."""

import errno
import json
import math
import os
import threading
from pathlib import Path

import pytest

from nanoslime.storage.shared_files import publish, publish_json, publish_once, read_json
from nanoslime.types import RunError


def test_publish_replaces_and_leaves_nothing_aside(tmp_path: Path) -> None:
    publish(tmp_path / "token", b"one", mode=0o600)
    publish(tmp_path / "token", b"two", mode=0o600)
    assert (tmp_path / "token").read_bytes() == b"two"
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["token"]


def test_what_no_json_reader_takes_is_null(tmp_path: Path) -> None:
    value = {"a": math.nan, "b": [math.inf, (-math.inf, 1.5)], "c": {"d": 2, "e": True}}
    publish_json(tmp_path / "f.json", value)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    read = json.loads((tmp_path / "f.json").read_bytes(), parse_constant=refuse)
    assert read == {"a": None, "b": [None, [None, 1.5]], "c": {"d": 2, "e": True}}


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


@pytest.mark.parametrize("hard_links", [True, False])
def test_of_several_one_publishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard_links: bool
) -> None:
    """Some file systems have no hard links, which is injected at the call."""

    def refused(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not hard_links:
        monkeypatch.setattr(os, "link", refused)
    together = threading.Barrier(8)
    made: dict[bytes, bool] = {}

    def publish_own(data: bytes) -> None:
        together.wait()
        made[data] = publish_once(tmp_path / "end.json", data)

    threads = [threading.Thread(target=publish_own, args=(b"%d" % i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [winner] = [data for data, was_made in made.items() if was_made]
    assert (tmp_path / "end.json").read_bytes() == winner
    assert os.listdir(tmp_path) == ["end.json"]


def test_a_link_that_nfs_made_twice_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def repeated(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", repeated)
    assert publish_once(tmp_path / "end.json", b"ours")
    assert not publish_once(tmp_path / "end.json", b"late")
