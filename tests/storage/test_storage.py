"""Manifests, atomic commits and retention: a directory on disk is whole or is named as damaged."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nanoslime.storage import commit, manifest
from nanoslime.storage.manifest import DamagedError
from tests.full_disk import mounted


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "step_1"
    (folder / "ranks").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(os.urandom(5000))
    (folder / "ranks" / "rng 0.bin").write_bytes(b"")
    manifest.write(folder)
    return folder


def test_a_whole_directory_verifies(checkpoint: Path) -> None:
    manifest.verify(checkpoint)


def test_several_may_share_the_files_that_are_hashed(checkpoint: Path) -> None:
    """Whether all of them are there, and how long they are, each sees itself."""
    flip_a_bit(checkpoint / "weights.bin")
    manifest.verify(checkpoint, share=0, num_shares=2)
    with pytest.raises(DamagedError, match="weights.bin was altered"):
        manifest.verify(checkpoint, share=1, num_shares=2)
    (checkpoint / "weights.bin").unlink()
    with pytest.raises(DamagedError, match="weights.bin is missing"):
        manifest.verify(checkpoint, share=0, num_shares=2)


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[4999] ^= 1
    file.write_bytes(data)


def append_a_byte(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"x")


DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing": (lambda d: (d / "weights.bin").unlink(), ["weights.bin", "missing"]),
    "truncated": (
        lambda d: os.truncate(d / "weights.bin", 4999),
        ["weights.bin", "truncated", "4999", "5000"],
    ),
    "too long": (
        lambda d: append_a_byte(d / "weights.bin"),
        ["weights.bin", "too long", "5001", "5000"],
    ),
    "altered": (lambda d: flip_a_bit(d / "weights.bin"), ["weights.bin", "altered"]),
    "not listed": (lambda d: (d / "ranks" / "rng 1.bin").touch(), ["rng 1.bin", "not listed"]),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), ["never completed"]),
    "no entries": (lambda d: (d / "manifest.json").write_text("{}"), ["is not a manifest"]),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named(checkpoint: Path, kind: str) -> None:
    damage, words = DAMAGES[kind]
    damage(checkpoint)
    with pytest.raises(DamagedError) as error:
        manifest.verify(checkpoint)
    assert all(word in str(error.value) for word in words), error.value


def save(directory: Path, step: int, data: bytes = b"x") -> Path:
    final = directory / f"step_{step}"
    partial = commit.partial_dir(final)
    (partial / "data").write_bytes(data)
    commit.commit(partial, final)
    return final


def test_nothing_counts_before_it_is_committed(tmp_path: Path) -> None:
    partial = commit.partial_dir(tmp_path / "step_3")
    (partial / "data").write_bytes(b"x")
    manifest.write(partial)
    assert commit.complete_checkpoints(tmp_path) == []
    commit.commit(partial, tmp_path / "step_3")
    assert commit.complete_checkpoints(tmp_path) == [(3, tmp_path / "step_3")]
    manifest.verify(tmp_path / "step_3")
    assert commit.complete_checkpoints(tmp_path / "absent") == []


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (10, 9, 100):
        save(tmp_path, step)
    assert [step for step, _ in commit.complete_checkpoints(tmp_path)] == [9, 10, 100]


def test_a_step_committed_again_replaces_the_old_one(tmp_path: Path) -> None:
    save(tmp_path, 1, b"old")
    final = save(tmp_path, 1, b"new")
    assert (final / "data").read_bytes() == b"new"
    manifest.verify(final)
    assert os.listdir(tmp_path) == ["step_1"]


def test_retention_keeps_last_every_and_best(tmp_path: Path) -> None:
    for step in range(1, 11):
        save(tmp_path, step)
    assert commit.retain(tmp_path, keep_last=2, keep_every=4, best=3) == [1, 2, 5, 6, 7]
    assert [step for step, _ in commit.complete_checkpoints(tmp_path)] == [3, 4, 8, 9, 10]


def test_retention_never_removes_the_only_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    commit.partial_dir(tmp_path / "step_2")  # being written: not yet a newer one
    assert commit.retain(tmp_path, keep_last=0) == []
    assert commit.retain(tmp_path, keep_last=1) == []


def test_leftovers_of_a_killed_write_go_at_the_next_start(tmp_path: Path) -> None:
    save(tmp_path, 1)
    partial = commit.partial_dir(tmp_path / "step_2")
    (partial / "half").write_bytes(b"x")
    assert commit.remove_leftovers(tmp_path) == [tmp_path / "step_2.partial"]
    assert os.listdir(tmp_path) == ["step_1"]


def test_what_cannot_be_removed_now_is_removed_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A mount inside keeps a checkpoint, as an open file on NFS does."""
    busy = save(tmp_path, 1) / "busy"
    save(tmp_path, 2)
    busy.mkdir()
    with mounted(busy):
        assert commit.retain(tmp_path, keep_last=1) == [1]
        assert "step_1.removed.partial cannot be removed now: [Errno 16]" in caplog.text
        assert commit.remove_leftovers(tmp_path) == []
        again = save(tmp_path, 1, b"again")
        save(tmp_path, 1, b"and again")
        assert commit.retain(tmp_path, keep_last=2) == []
        assert (again / "data").read_bytes() == b"and again"
        assert len(os.listdir(tmp_path)) == 3
    assert commit.retain(tmp_path, keep_last=2) == []
    assert sorted(os.listdir(tmp_path)) == ["step_1", "step_2"]


def test_a_busy_leftover_gives_up_its_name(tmp_path: Path) -> None:
    busy = commit.partial_dir(tmp_path / "step_1") / "busy"
    busy.mkdir()
    with mounted(busy):
        final = save(tmp_path, 1)
    manifest.verify(final)
    [leftover] = commit.remove_leftovers(tmp_path)
    assert leftover.name.startswith("step_1.")
    assert os.listdir(tmp_path) == ["step_1"]
