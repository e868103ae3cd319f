"""Whatever ends a conversion, whenever: source and earlier output are whole, and a rerun continues."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nanoslime.storage import commit
from tests.models.hf import save_model
from tests.tools.checkpoints import contents, edit, make, make_big, to_huggingface, to_megatron
from tools.conversion import run
from tools.conversion.tensor_copy import TargetFile

ROOT = Path(__file__).parents[2]
SLOW_DISK = """
import functools, os, runpy, signal, sys, time

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs the suite in background

def slow(read, *arguments):
    time.sleep(0.005)
    return read(*arguments)

os.preadv, os.copy_file_range = (functools.partial(slow, f) for f in (os.preadv, os.copy_file_range))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
TOOLS = {"hf_to_megatron": "hf", "megatron_to_hf": "megatron"}  # name -> what it reads


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> Iterator[Path]:
    """A directory with hf and megatron, 130 MB each, in files of 12 and of 64 MB."""
    directory = tmp_path_factory.mktemp("big")
    make_big(directory / "hf")
    assert to_megatron(directory / "hf", directory / "megatron") == 0
    assert to_huggingface(directory / "megatron", directory / "back") == 0
    yield directory
    shutil.rmtree(directory)


def start(tool: str, *arguments: object) -> subprocess.Popen[str]:
    """On a disk of some 200 MB/s: time enough to look at its files and send a signal."""
    command = [sys.executable, "-c", SLOW_DISK, ROOT / "tools" / f"{tool}.py", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def size_of(directory: Path) -> int:
    files = (
        os.path.join(d, n)
        for d, _, names in os.walk(directory)
        for n in names
        if not n.startswith(".")
    )
    return sum(os.stat(file).st_size for file in files)


def wait_for_bytes(process: subprocess.Popen[str], directory: Path, count: float) -> None:
    """Until the files below `directory` have `count` bytes, or the process has ended."""
    end = time.monotonic() + 120
    while process.poll() is None:
        if (size := size_of(directory)) >= count:
            return
        assert time.monotonic() < end, f"{directory} has {size} of {count} bytes after 120 s"
        time.sleep(0.001)


def whole_files(partial: Path) -> dict[str, tuple[int, int]]:
    """name -> inode and time of the last change, of the files that the journal calls whole."""
    if not (partial / run.PROGRESS).exists():
        return {}
    done = json.loads((partial / run.PROGRESS).read_text())["done"]
    return {
        name: ((partial / name).stat().st_ino, (partial / name).stat().st_mtime_ns) for name in done
    }


@pytest.mark.parametrize("tool", TOOLS)
def test_killed_at_any_moment_and_continued(big, tmp_path, tool):
    source, out, partial = big / TOOLS[tool], tmp_path / "out", tmp_path / "out.partial"
    expected, rng = (
        contents(big / ("megatron" if tool == "hf_to_megatron" else "back")),
        random.Random(3),
    )
    before, finished, killed, kept = contents(source), {}, 0, 0
    for _ in range(30):
        there = size_of(partial)
        process = start(tool, source, out, "--threads", 1)
        wait_for_bytes(process, partial, there + rng.uniform(0.05, 0.6) * (128e6 - there))
        process.send_signal(signal.SIGINT if killed == 2 else signal.SIGKILL)
        output, error = process.communicate(timeout=60)
        if out.exists():  # it was faster than the signal: again from the beginning
            assert contents(out) == expected and not partial.exists()
            shutil.rmtree(out)
            finished = {}
            continue
        codes = (
            (130, -signal.SIGINT) if killed == 2 else (-signal.SIGKILL,)
        )  # -SIGINT: while Python starts or ends
        assert process.returncode in codes, (output, error)
        killed += 1
        now = whole_files(partial)
        assert finished.items() <= now.items()
        finished, kept = now, max(kept, len(now))
        if killed >= 4 and finished:
            break
    assert killed >= 4 and kept >= 1
    process = start(tool, source, out)
    output, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert contents(out) == expected and not partial.exists()
    for name, known in finished.items():
        assert ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) == known
    assert contents(source) == before
    shutil.rmtree(out)


def test_two_conversions_into_one_output(big, tmp_path, capsys):
    first = start("megatron_to_hf", big / "megatron", tmp_path / "out", "--threads", 1)
    wait_for_bytes(first, tmp_path / "out.partial", 1)
    first.send_signal(signal.SIGSTOP)
    try:
        assert first.poll() is None
        assert to_huggingface(big / "megatron", tmp_path / "out") == 2
        assert "out.partial is being written by another conversion" in capsys.readouterr().err
    finally:
        first.send_signal(signal.SIGCONT)
    _, error = first.communicate(timeout=120)
    assert first.returncode == 0, error
    assert contents(tmp_path / "out") == contents(big / "back")
    shutil.rmtree(tmp_path / "out")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A directory with hf (nine files), megatron, and back, equal to hf but with a manifest."""
    directory = tmp_path_factory.mktemp("small")
    make(directory / "hf", "llama", shards=True)
    assert to_megatron(directory / "hf", directory / "megatron") == 0
    assert to_huggingface(directory / "megatron", directory / "back") == 0
    return directory


def break_write(monkeypatch: pytest.MonkeyPatch, number: int, error: Exception | None) -> list[str]:
    """Raises `error` in the write of that number; the files whose writing was begun."""
    begun, real = [], run.write

    def write(target: TargetFile, *arguments, **options) -> str | None:
        begun.append(target.name)
        if len(begun) == number and error:
            raise error
        return real(target, *arguments, **options)

    monkeypatch.setattr(run, "write", write)
    return begun


@pytest.mark.parametrize("threads", [1, 3])
def test_a_broken_worker_ends_all_and_a_rerun_continues(
    small, tmp_path, monkeypatch, capsys, threads
):
    convert = [small / "megatron", tmp_path / "out", "--threads", threads]
    with monkeypatch.context() as broken:
        begun = break_write(broken, 4, OSError(errno.EIO, "the disk is broken", "/dev/sda"))
        assert to_huggingface(*convert) == 1
    assert "megatron_to_hf: [Errno 5] the disk is broken: '/dev/sda'" in capsys.readouterr().err
    assert 4 <= len(begun) < 4 + threads and not (tmp_path / "out").exists()
    finished = whole_files(tmp_path / "out.partial")
    assert len(finished) >= 4 - threads
    begun = break_write(monkeypatch, 0, None)
    assert to_huggingface(*convert) == 0
    assert not finished.keys() & set(begun)
    assert contents(tmp_path / "out") == contents(small / "back")


@pytest.mark.parametrize(
    "how", ["source", "options", "a file is gone", "a file is short", "a file is not whole"]
)
def test_what_cannot_be_continued_starts_anew(small, tmp_path, monkeypatch, how):
    source = shutil.copytree(small / "hf", tmp_path / "hf")
    middle = shutil.copytree(small / "megatron", tmp_path / "megatron")
    with monkeypatch.context() as broken:
        break_write(broken, 4, OSError(errno.EIO, "broken"))
        assert to_huggingface(middle, tmp_path / "out", "--threads", 1) == 1
    finished = sorted(whole_files(tmp_path / "out.partial"))
    assert len(finished) == 3
    options = ["--no-checksums"] if how == "options" else []
    if how == "source":
        edit(source, "model.norm.weight", lambda t: t["model.norm.weight"].add_(1))
        assert to_megatron(source, middle, "--force") == 0
    elif how == "a file is gone":
        (tmp_path / "out.partial" / finished[0]).unlink()
    elif how == "a file is short":
        os.truncate(tmp_path / "out.partial" / finished[0], 10)
    elif (
        how == "a file is not whole"
    ):  # its bytes were not yet forced to disk: of full size, not in the journal
        (tmp_path / "out.partial" / finished[0]).write_bytes(
            bytes((source / finished[0]).stat().st_size)
        )
        journal = tmp_path / "out.partial" / run.PROGRESS
        values = json.loads(journal.read_text())
        del values["done"][finished[0]]
        journal.write_text(json.dumps(values))
    begun = break_write(monkeypatch, 0, None)
    assert to_huggingface(middle, tmp_path / "out", *options) == 0
    again = finished[:1] if how.startswith("a file") else finished
    assert [name for name in finished if name in begun] == again
    result = contents(tmp_path / "out")
    assert (result.pop("manifest.json", None) is None) == (how == "options")
    assert result == contents(source)


@pytest.mark.parametrize(
    "how, code, message",
    [
        (lambda file: os.truncate(file, 3000), 2, "{file} has no byte"),
        (lambda file: file.unlink(), 1, "No such file or directory: '{file}'"),
    ],
)
def test_a_source_that_changes_under_the_copy_ends_it(
    small, tmp_path, monkeypatch, capsys, how, code, message
):
    source = shutil.copytree(small / "hf", tmp_path / "hf")
    file = sorted(source.glob("*.safetensors"))[4]
    real = run._check_space

    def check_space(num_bytes: int, directory: Path) -> None:  # after the plan, before the copy
        real(num_bytes, directory)
        how(file)

    monkeypatch.setattr(run, "_check_space", check_space)
    assert to_megatron(source, tmp_path / "out") == code
    assert message.format(file=file) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 4 MB."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", mounted], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a small tmpfs needs the right to mount: {done.stderr}")
    yield mounted
    subprocess.run(["umount", mounted], check=True)


def fill_up(disk: Path, leave: int) -> Path:
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - leave))
    return filler


def test_a_full_disk_leaves_everything_as_it_was(disk, tmp_path, monkeypatch, capsys):
    source = save_model(tmp_path / "hf", "llama", vocab_size=11_000, max_shard_size="200KB")  # 3 MB
    old, before = disk / "out" / "old", contents(source)
    old.parent.mkdir()
    old.write_text("an earlier output")
    filler = fill_up(disk, 1 << 20)
    assert to_megatron(source, disk / "out", "--force") == 2
    assert "0.00 GB are to be written, 0.00 GB are free" in capsys.readouterr().err
    assert old.exists() and not contents(disk / "out.partial")
    filler.unlink()
    real = run._check_space

    def check_space(num_bytes: int, directory: Path) -> None:
        real(num_bytes, directory)
        fill_up(disk, 1 << 20)  # by somebody else, meanwhile

    with monkeypatch.context() as filling:
        filling.setattr(run, "_check_space", check_space)
        assert to_megatron(source, disk / "out", "--force") == 2
    assert (
        "out.partial: no space left; free some and run the same command again"
        in capsys.readouterr().err
    )
    assert contents(disk / "out") == {"old": contents(tmp_path / "disk/out")["old"]}
    assert old.read_text() == "an earlier output" and contents(source) == before
    filler.unlink()
    assert to_megatron(source, disk / "out", "--force") == 0
    assert not old.exists() and (disk / "out/release/.metadata").exists()
    assert to_huggingface(disk / "out", tmp_path / "back") == 0
    assert contents(tmp_path / "back").items() >= before.items()


def test_an_output_is_replaced_only_with_force_and_only_at_the_end(
    small, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    assert to_huggingface(small / "megatron", out) == 2
    assert (
        "out exists; choose another output, or replace it with --force" in capsys.readouterr().err
    )
    seen: list[tuple[str, bool, bool]] = []

    def spy(name: str, module: object, function: str) -> None:
        real: Callable[..., object] = getattr(module, function)

        def call(*arguments, **options):
            seen.append((name, (out / "old").exists(), (out / "manifest.json").exists()))
            return real(*arguments, **options)

        monkeypatch.setattr(module, function, call)

    spy("write", run, "write")
    spy("put in place", run, "put_in_place")
    spy("remove", commit.shutil, "rmtree")
    assert to_huggingface(small / "megatron", out, "--force") == 0
    assert set(seen[:-2]) == {("write", True, False)}
    assert seen[-2:] == [("put in place", True, False), ("remove", False, True)]
    assert contents(out) == contents(small / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_an_output_that_appears_meanwhile_is_not_replaced(small, tmp_path, monkeypatch, capsys):
    real = run._check_space

    def check_space(num_bytes: int, directory: Path) -> None:
        (tmp_path / "out").mkdir()
        real(num_bytes, directory)

    monkeypatch.setattr(run, "_check_space", check_space)
    assert to_huggingface(small / "megatron", tmp_path / "out") == 2
    assert "out exists" in capsys.readouterr().err and not contents(tmp_path / "out")


def test_an_output_that_is_no_directory_is_refused(small, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    assert to_huggingface(small / "megatron", tmp_path / "out", "--force") == 2
    assert "it is no directory" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "a file"


def test_a_link_to_an_output_keeps_pointing_to_it(small, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert to_huggingface(small / "megatron", tmp_path / "link", "--force") == 0
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "real") == contents(
        small / "back"
    )


@pytest.mark.parametrize(
    "name",
    ["megatron", "megatron/release", "megatron/new", "megatron/hf", ".", "hf", "hf/new", "other"],
)
def test_an_output_that_overlaps_the_source_is_refused(small, tmp_path, capsys, name):
    """`other` would be written as other.partial, which is the source here."""
    source = tmp_path / ("other.partial" if name == "other" else "megatron")
    shutil.copytree(small / "megatron", source)
    original = shutil.copytree(small / "hf", tmp_path / "hf")
    before = contents(tmp_path)
    for options in ([], ["--force"], ["--dry-run", "--force"]):
        code = to_huggingface(source, tmp_path / name, *options, "--hf-checkpoint", original)
        error = capsys.readouterr().err
        assert code == 2 and ("overlaps the source" in error or (not options and "exists" in error))
        assert contents(tmp_path) == before
