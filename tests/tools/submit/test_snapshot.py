"""The code of a job: what is copied into its run's directory, and what a user is told of it."""

import shutil
import subprocess
from pathlib import Path

import pytest

from jobs.checkout import ROOT
from tools.submit import snapshot

CODE = ["jobs/c.py", "nanoslime/a.py", "nanoslime/data/b.txt", "nanoslime/new.py", "tools/d.html"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small one that git tracks, with data and caches beside the code."""
    root = tmp_path / "it's a checkout"
    for name in ("nanoslime/a.py", "nanoslime/data/b.txt", "jobs/c.py", "tools/d.html", "env/e.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    subprocess.run(["git", "add", "."], cwd=root, check=True)
    for name in ("nanoslime/new.py", "nanoslime/big.bin", "jobs/__pycache__/c.pyc", "mine.py"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(name)
    return root


def names(place: Path) -> list[str]:
    return sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())


def test_a_snapshot_is_what_git_tracks_and_any_other_python(tmp_path: Path, checkout: Path) -> None:
    place = snapshot.take(snapshot.next_place(tmp_path), checkout)
    assert place == tmp_path / "code" / "1"
    assert names(place) == ["SHA256", *CODE]
    assert (place / "nanoslime/new.py").read_text() == "nanoslime/new.py"
    (checkout / "jobs/c.py").unlink()
    assert "jobs/c.py" not in names(snapshot.take(snapshot.next_place(tmp_path), checkout))


def test_without_git_it_is_what_looks_like_code(tmp_path: Path, checkout: Path) -> None:
    shutil.rmtree(checkout / ".git")
    without = [name for name in CODE if not name.endswith(".txt")]
    assert names(snapshot.take(snapshot.next_place(tmp_path), checkout)) == ["SHA256", *without]


def test_each_submission_has_its_own_and_is_told_whether_the_code_has_changed(
    tmp_path: Path, checkout: Path
) -> None:
    assert snapshot.newest(tmp_path) == ROOT
    for number in range(1, 12):
        assert snapshot.next_place(tmp_path).name == str(number)
        assert snapshot.take(snapshot.next_place(tmp_path), checkout) == snapshot.newest(tmp_path)
    assert "; the same as" in snapshot.describe(tmp_path / "code" / "11")
    (checkout / "nanoslime/a.py").write_text("edited")
    last = snapshot.describe(snapshot.take(snapshot.next_place(tmp_path), checkout))
    assert last.startswith(f"code: {tmp_path}/code/12 (sha256 ")
    assert last.endswith(f"; other code than {tmp_path}/code/11")
    assert (tmp_path / "code/11/nanoslime/a.py").read_text() == "nanoslime/a.py"


def test_the_snapshot_of_this_checkout_is_small_and_whole(tmp_path: Path) -> None:
    place = snapshot.take(snapshot.next_place(tmp_path))
    assert sum(path.stat().st_size for path in place.rglob("*") if path.is_file()) < 4_000_000
    for name in ("nanoslime/config/upstream/set_by_nanoslime.yaml", "jobs/node.py"):
        assert (place / name).read_bytes() == (ROOT / name).read_bytes()


def test_a_snapshot_that_cannot_be_made_leaves_nothing(tmp_path: Path, checkout: Path) -> None:
    """Another submission at the same moment has the place: its code stays."""
    place = tmp_path / "code"
    place.mkdir()
    (place / "theirs").touch()
    with pytest.raises(OSError):
        snapshot.take(place, checkout)
    assert names(place) == ["theirs"]
    assert not (tmp_path / ".new-code").exists()
