"""Damaged and hostile files of either format are named, and nothing is written."""

import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nanoslime.storage.safetensors_file import INDEX_FILE, read_headers
from tests.tools.checkpoints import (
    HOSTILE_CALL,
    contents,
    copy,
    edit,
    read_stock_metadata,
    to_huggingface,
    to_megatron,
)
from tools.conversion import torch_dist, torch_pickle
from tools.conversion.checkpoint import HEADERS, LATEST

CONVERSIONS = {"megatron": to_huggingface, "old_megatron": to_huggingface, "back": to_megatron}
MEGATRON_FILES = {
    "release/.metadata",
    "release/metadata.json",
    "release/__0_0.distcp",
    "hf/config.json",
    f"hf/{HEADERS}",
    LATEST,
}


@pytest.mark.parametrize("which", CONVERSIONS)
def test_a_flipped_bit_anywhere_is_found(llama, tmp_path, refused, which):
    source = copy(llama / which, tmp_path / "source")
    rng = random.Random(1)
    names = contents(source).keys()
    assert {"manifest.json"} < names
    if which != "back":
        assert MEGATRON_FILES <= names
        assert ("release/common.pt" in names) == (which == "old_megatron")
    for name in sorted(names - {"manifest.json"}):
        good = (source / name).read_bytes()
        for place in (0, len(good) - 1, rng.randrange(len(good)), rng.randrange(len(good))):
            bit = rng.choice([rng.randrange(8), 7])
            bad = bytearray(good)
            bad[place] ^= 1 << bit
            (source / name).write_bytes(bad)
            refused(CONVERSIONS[which], source, re.escape(Path(name).name))
        (source / name).write_bytes(good)


@pytest.mark.parametrize("which", CONVERSIONS)
def test_a_flipped_bit_of_the_manifest_is_found_or_harmless(llama, tmp_path, capsys, which):
    convert = CONVERSIONS[which]
    source = copy(llama / which, tmp_path / "source")
    rng = random.Random(2)
    assert convert(source, tmp_path / "expected") == 0
    expected = contents(tmp_path / "expected")
    good = (source / "manifest.json").read_bytes()
    harmful = [good.index(name) + 2 for name in (b'"files"', b'"bytes"', b'"xxh3_128":')]
    for place in harmful + [rng.randrange(len(good)) for _ in range(20)]:
        bad = bytearray(good)
        bad[place] ^= 1 << rng.randrange(8)
        (source / "manifest.json").write_bytes(bad)
        code = convert(source, tmp_path / "out")
        assert code in (0, 2)
        if code == 0:
            assert contents(tmp_path / "out") == expected
            shutil.rmtree(tmp_path / "out")
        assert not (tmp_path / "out.partial").exists()
        if place in harmful:
            assert code == 2 and "manifest.json" in capsys.readouterr().err


NORM = "model.norm.weight"


def last_shard(directory: Path) -> Path:
    return max(directory.glob("*.safetensors"))


def cut_last_shard(directory: Path) -> None:
    file = last_shard(directory)
    os.truncate(file, file.stat().st_size - 1)


def change_index(directory: Path, change: Callable[[dict[str, str]], object]) -> None:
    values = json.loads((directory / INDEX_FILE).read_text())
    change(values["weight_map"])
    (directory / INDEX_FILE).write_text(json.dumps(values))


def list_absent_file(directory: Path) -> None:
    change_index(directory, lambda files: files.update({NORM: "model-x.safetensors"}))


def list_another_file(directory: Path) -> None:
    def change(files: dict[str, str]) -> None:
        files[NORM] = min(set(files.values()) - {files[NORM]})

    change_index(directory, change)


def unlist(directory: Path) -> None:
    change_index(directory, lambda files: files.pop(NORM))


def hold_twice(directory: Path) -> None:
    """Add to the third shard a tensor that the second one holds."""
    _, second, third = sorted(directory.glob("*.safetensors"))[:3]
    names = {info.file: name for name, info in reversed(read_headers(directory).items())}
    edit(directory, names[third], lambda tensors: tensors.update({names[second]: torch.ones(1)}))


HF_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (cut_last_shard, "is truncated"),
    "header only": (lambda d: os.truncate(last_shard(d), 100), "truncated or not safetensors"),
    "missing shard": (lambda d: last_shard(d).unlink(), r"model-\d+-of-\d+.safetensors is missing"),
    "absent file": (list_absent_file, f"model-x.safetensors is missing; {INDEX_FILE} lists it"),
    "another file": (list_another_file, f"does not hold {NORM}, although"),
    "unlisted": (unlist, f"holds {NORM}, which .* does not list"),
    "twice": (hold_twice, r"00003.* holds model.*, and so does .*00002"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json does not exist"),
}


@pytest.mark.parametrize("kind", HF_DAMAGE)
def test_damaged_hugging_face_files_are_refused(llama, tmp_path, refused, kind):
    source = copy(llama / "hf", tmp_path / "hf")
    damage, message = HF_DAMAGE[kind]
    damage(source)
    refused(to_megatron, source, message)


def replace_in(file: Path, old: bytes, new: bytes) -> None:
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new))


def cut(file: Path, num_bytes: int) -> None:
    os.truncate(file, file.stat().st_size - num_bytes)


MEGATRON_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (
        lambda d: cut(d / "release/__0_0.distcp", 1),
        r"__0_0\.distcp: \S+: truncated",
    ),
    "missing chunks": (
        lambda d: (d / "release/__0_0.distcp").unlink(),
        r"__0_0\.distcp is missing",
    ),
    "missing metadata": (lambda d: (d / "release/.metadata").unlink(), "is no checkpoint"),
    "other backend": (
        lambda d: replace_in(d / "release/metadata.json", b"torch_dist", b"zarr"),
        r"metadata\.json says .*zarr",
    ),
    "no number": (
        lambda d: (d / LATEST).write_text("relea5e"),
        r"latest_checkpointed_iteration\.txt says 'relea5e'",
    ),
    "no iteration": (lambda d: (d / LATEST).write_text("7"), "is no checkpoint"),
    "no config": (lambda d: (d / "hf/config.json").unlink(), "say with --hf-checkpoint DIR"),
    "headers lead outside": (
        lambda d: replace_in(d / "hf" / HEADERS, b'"model-', b'"../model-'),
        "names '../model-.*no file of that directory",
    ),
    "headers of another model": (
        lambda d: replace_in(d / "hf" / HEADERS, b"model.norm.w", b"model.norm.W"),
        r"safetensors has model.norm.Weight \[32\], but .* has nothing of that name",
    ),
}


@pytest.mark.parametrize("which", ["megatron", "old_megatron"])
@pytest.mark.parametrize("kind", MEGATRON_DAMAGE)
def test_damaged_megatron_files_are_refused(llama, tmp_path, refused, kind, which):
    source = copy(llama / which, tmp_path / "megatron")
    damage, message = MEGATRON_DAMAGE[kind]
    damage(source)
    refused(to_huggingface, source, message, "--no-checksums")


def move_container(release: Path, key: str, content: bytes) -> None:
    """Add `content` to a .distcp file, and let .metadata say that the container of `key` is it."""
    file = release / "__0_0.distcp"
    before = file.read_bytes()
    file.write_bytes(before + content)
    metadata = read_stock_metadata(release)
    place = next(info for index, info in metadata.storage_data.items() if index.fqn == key)
    place.offset = len(before)
    place.length = len(content)
    (release / ".metadata").write_bytes(pickle.dumps(metadata))


def forget_common_state(release: Path) -> None:
    metadata = read_stock_metadata(release)
    del metadata.state_dict_metadata[torch_dist.COMMON_KEY]
    (release / ".metadata").write_bytes(pickle.dumps(metadata))


COMMON_DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing file": (
        "old_megatron",
        lambda release: (release / "common.pt").unlink(),
        r"common\.pt is missing",
    ),
    "cut file": ("old_megatron", lambda release: cut(release / "common.pt", 9), r"common\.pt"),
    "missing object": (
        "megatron",
        forget_common_state,
        r"common\.pt is missing, and \.metadata has no common_state/shard_0_1",
    ),
    "cut object": (
        "megatron",
        lambda release: move_container(
            release, torch_dist.COMMON_KEY, torch_pickle.EMPTY_OBJECT[:-9]
        ),
        r"__0_0\.distcp: common_state/shard_0_1: no container",
    ),
    "empty object": (
        "megatron",
        lambda release: move_container(release, torch_dist.COMMON_KEY, torch_pickle.EMPTY_OBJECT),
        r"__0_0\.distcp: common_state/shard_0_1: it holds a NoneType, not a dictionary",
    ),
}


@pytest.mark.parametrize("kind", COMMON_DAMAGE)
def test_a_damaged_common_state_is_refused(llama, tmp_path, refused, kind):
    which, damage, message = COMMON_DAMAGE[kind]
    source = copy(llama / which, tmp_path / "megatron")
    damage(source / "release")
    refused(to_huggingface, source, message, "--no-checksums")


@pytest.mark.parametrize(
    "which, place",
    [
        ("megatron", ".metadata"),
        ("megatron", "output_layer.weight"),
        ("megatron", torch_dist.COMMON_KEY),
        ("old_megatron", "common.pt"),
    ],
)
def test_a_malicious_pickle_is_refused_and_not_executed(
    llama, tmp_path, refused, evil, which, place
):
    source = copy(llama / which, tmp_path / "megatron")
    release = source / "release"
    container = b"".join(torch_pickle.archive(evil))
    if place == ".metadata":
        (release / ".metadata").write_bytes(evil)
    elif place == "common.pt":
        (release / "common.pt").write_bytes(container)
    else:
        move_container(release, place, container)
    message = rf"{re.escape(place)}: .*pickle names {HOSTILE_CALL},.*refused"
    refused(to_huggingface, source, message, "--no-checksums")
    if place == ".metadata":
        assert to_huggingface(source, tmp_path / "dry", "--dry-run") == 2
