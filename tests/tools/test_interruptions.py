"""Whatever ends a conversion: source and earlier output are whole, and a rerun continues."""

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
from contextlib import suppress
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

# a shell that runs the suite in the background lets its children ignore SIGINT
signal.signal(signal.SIGINT, signal.default_int_handler)

def slow(read, *arguments):
    time.sleep(0.005)
    return read(*arguments)

os.preadv = functools.partial(slow, os.preadv)
os.copy_file_range = functools.partial(slow, os.copy_file_range)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# name: the directory of the fixture that it reads, and the one that equals its output
TOOLS = {"hf_to_megatron": ("hf", "megatron"), "megatron_to_hf": ("megatron", "back")}


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
    """Bytes of all files below `directory`, without those that are still being published."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            if not name.startswith("."):
                # Another process may put a file in place, or take it away, while we look.
                with suppress(FileNotFoundError):
                    total += os.stat(os.path.join(folder, name)).st_size
    return total


def wait_for_bytes(process: subprocess.Popen[str], directory: Path, count: float) -> None:
    """Until the files below `directory` have `count` bytes, or the process has ended."""
    deadline = time.monotonic() + 120
    while process.poll() is None:
        size = size_of(directory)
        if size >= count:
            return
        assert time.monotonic() < deadline, f"{directory} has {size} of {count} bytes after 120 s"
        time.sleep(0.001)


def identity(file: Path) -> tuple[int, int]:
    """Inode and time of the last change."""
    state = file.stat()
    return state.st_ino, state.st_mtime_ns


def whole_files(partial: Path) -> dict[str, tuple[int, int]]:
    """name -> identity of the files that the journal calls whole."""
    journal = partial / run.PROGRESS
    if not journal.exists():
        return {}
    done = json.loads(journal.read_text())["done"]
    return {name: identity(partial / name) for name in done}


@pytest.mark.parametrize("tool", TOOLS)
def test_killed_at_any_moment_and_continued(big, tmp_path, tool):
    read, equal = TOOLS[tool]
    source = big / read
    out = tmp_path / "out"
    partial = tmp_path / "out.partial"
    expected = contents(big / equal)
    before = contents(source)
    rng = random.Random(3)
    finished: dict[str, tuple[int, int]] = {}
    killed = 0
    for _ in range(30):
        size = size_of(partial)
        process = start(tool, source, out, "--threads", 1)
        wait_for_bytes(process, partial, size + rng.uniform(0.05, 0.6) * (128e6 - size))
        if killed == 2:
            process.send_signal(signal.SIGINT)
            codes = (130, -signal.SIGINT)  # -SIGINT: while Python starts or ends
        else:
            process.kill()
            codes = (-signal.SIGKILL,)
        output, error = process.communicate(timeout=60)
        if out.exists():  # it was faster than the signal: again from the beginning
            assert contents(out) == expected and not partial.exists()
            shutil.rmtree(out)
            finished = {}
            continue
        assert process.returncode in codes, (output, error)
        killed += 1
        still_there = whole_files(partial)
        assert finished.items() <= still_there.items()
        finished = still_there
        if killed >= 4 and finished:
            break
    assert killed >= 4 and finished
    process = start(tool, source, out)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert contents(out) == expected and not partial.exists()
    for name, known in finished.items():
        assert identity(out / name) == known
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


def break_write(monkeypatch: pytest.MonkeyPatch, number: int, error: Exception) -> list[str]:
    """Raises `error` in the write of that number; the files whose writing was begun."""
    begun = []
    real = run.write

    def write(target: TargetFile, *arguments, **options) -> str | None:
        begun.append(target.name)
        if len(begun) == number:
            raise error
        return real(target, *arguments, **options)

    monkeypatch.setattr(run, "write", write)
    return begun


def spy_on_write(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose writing was begun."""
    begun = []
    real = run.write

    def write(target: TargetFile, *arguments, **options) -> str | None:
        begun.append(target.name)
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
    begun = spy_on_write(monkeypatch)
    assert to_huggingface(*convert) == 0
    assert not finished.keys() & set(begun)
    assert contents(tmp_path / "out") == contents(small / "back")


def change_source(small: Path, source: Path) -> None:
    """Convert a model with another norm to the checkpoint that is read."""
    model = source.with_name("changed")
    shutil.copytree(small / "hf", model)
    edit(model, "model.norm.weight", lambda tensors: tensors["model.norm.weight"].add_(1))
    assert to_megatron(model, source, "--force") == 0


def forget_and_clear(partial: Path, name: str) -> None:
    """As a file whose bytes are not yet forced to disk: of full size, and not in the journal."""
    file = partial / name
    file.write_bytes(bytes(file.stat().st_size))
    journal = partial / run.PROGRESS
    values = json.loads(journal.read_text())
    del values["done"][name]
    journal.write_text(json.dumps(values))


@pytest.fixture
def interrupted(small, tmp_path, monkeypatch) -> Path:
    """A directory with megatron, and with a conversion of it that ended after three files."""
    shutil.copytree(small / "megatron", tmp_path / "megatron")
    with monkeypatch.context() as broken:
        break_write(broken, 4, OSError(errno.EIO, "broken"))
        assert to_huggingface(tmp_path / "megatron", tmp_path / "out", "--threads", 1) == 1
    assert len(whole_files(tmp_path / "out.partial")) == 3
    return tmp_path


@pytest.mark.parametrize("damage", ["gone", "short", "not whole"])
def test_a_damaged_file_of_an_interrupted_run_is_written_anew(
    small, interrupted, monkeypatch, damage
):
    partial = interrupted / "out.partial"
    finished = sorted(whole_files(partial))
    if damage == "gone":
        (partial / finished[0]).unlink()
    elif damage == "short":
        os.truncate(partial / finished[0], 10)
    else:
        forget_and_clear(partial, finished[0])
    begun = spy_on_write(monkeypatch)
    assert to_huggingface(interrupted / "megatron", interrupted / "out") == 0
    assert [name for name in finished if name in begun] == finished[:1]
    assert contents(interrupted / "out") == contents(small / "back")


def test_another_source_starts_anew(small, interrupted, monkeypatch):
    finished = sorted(whole_files(interrupted / "out.partial"))
    change_source(small, interrupted / "megatron")
    begun = spy_on_write(monkeypatch)
    assert to_huggingface(interrupted / "megatron", interrupted / "out") == 0
    assert [name for name in finished if name in begun] == finished
    result = contents(interrupted / "out")
    assert result.pop("manifest.json")
    assert result == contents(interrupted / "changed")


def test_other_options_start_anew(small, interrupted, monkeypatch):
    finished = sorted(whole_files(interrupted / "out.partial"))
    begun = spy_on_write(monkeypatch)
    assert to_huggingface(interrupted / "megatron", interrupted / "out", "--no-checksums") == 0
    assert [name for name in finished if name in begun] == finished
    assert contents(interrupted / "out") == contents(small / "hf")


def before_the_copy(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Lets something happen between the plan and the copy."""
    real = run._check_space

    def check_space(num_bytes: int, directory: Path) -> None:
        real(num_bytes, directory)
        action()

    monkeypatch.setattr(run, "_check_space", check_space)


@pytest.mark.parametrize(
    "change, code, message",
    [
        (lambda file: os.truncate(file, 3000), 2, "{file} has no byte"),
        (lambda file: file.unlink(), 1, "No such file or directory: '{file}'"),
    ],
)
def test_a_source_that_changes_under_the_copy_ends_it(
    small, tmp_path, monkeypatch, capsys, change, code, message
):
    source = shutil.copytree(small / "hf", tmp_path / "hf")
    file = sorted(source.glob("*.safetensors"))[4]
    before_the_copy(monkeypatch, lambda: change(file))
    assert to_megatron(source, tmp_path / "out") == code
    assert message.format(file=file) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 4 MB."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", mounted]
    done = subprocess.run(command, capture_output=True, text=True)
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
    before = contents(source)
    old = disk / "out" / "old"
    old.parent.mkdir()
    old.write_text("an earlier output")
    filler = fill_up(disk, 1 << 20)
    assert to_megatron(source, disk / "out", "--force") == 2
    assert "0.00 GB are to be written, 0.00 GB are free" in capsys.readouterr().err
    assert old.exists() and not contents(disk / "out.partial")
    filler.unlink()
    with monkeypatch.context() as filling:
        before_the_copy(filling, lambda: fill_up(disk, 1 << 20))  # by somebody else, meanwhile
        assert to_megatron(source, disk / "out", "--force") == 2
    message = "out.partial: no space left; free some and run the same command again"
    assert message in capsys.readouterr().err
    assert contents(disk / "out").keys() == {"old"}
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
    message = "out exists; choose another output, or replace it with --force"
    assert message in capsys.readouterr().err
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
    before_the_copy(monkeypatch, (tmp_path / "out").mkdir)
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
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "real") == contents(small / "back")


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
