"""What is missing, superfluous, damaged or hostile is named, and nothing is written."""

import json
import os
import pickle
import random
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nanoslime.models.rules import ModelPartition, pieces
from nanoslime.models.shape import ModelShape
from nanoslime.storage import manifest
from nanoslime.storage.safetensors_file import INDEX_FILE, read_headers
from tests.models.hf import FAMILIES
from tests.tools.checkpoints import (
    FORMS,
    Tensors,
    contents,
    edit,
    load_stock,
    make,
    read_stock_metadata,
    save_stock,
    to_huggingface,
    to_megatron,
    turn_into_old_form,
)
from tools.conversion import keys, torch_dist, torch_pickle
from tools.conversion.checkpoint import HEADERS, LATEST

Refused = Callable[..., None]
FEW = 2  # names that are tried of every family: enough, as the families share their rules


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> Path:
    """A directory with hf, a sharded checkpoint, and megatron, the same as torch writes it."""
    directory = tmp_path_factory.mktemp(request.param)
    source = make(directory / "hf", request.param, shards=True)
    assert to_megatron(source, directory / "ours") == 0
    weights = set()
    for piece in pieces(ModelShape.read(source), ModelPartition()):
        key, _ = keys.key_of(piece.megatron)
        weights.add(key)
    stored = load_stock(directory / "ours/release")
    save_stock(directory / "megatron/release", {key: stored[key] for key in weights})
    shutil.copytree(directory / "ours/hf", directory / "megatron/hf")
    assert to_huggingface(directory / "megatron", directory / "back") == 0
    return directory


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Whether a conversion of `source` is refused with this message, before anything is written."""

    def check(convert: Callable[..., int], source: Path, message: str, *options: object) -> None:
        before = contents(source)
        capsys.readouterr()
        assert convert(source, tmp_path / "out", *options) == 2, message
        error = capsys.readouterr().err
        last = error.strip().splitlines()[-1]
        assert re.search(message, last), (message, error)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
        assert contents(source) == before

    return check


def copy(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


def few(names: set[str] | dict[str, object]) -> list[str]:
    return random.Random(0).sample(sorted(names), FEW)


def test_a_wrong_tensor_of_hugging_face_is_named_with_its_file(family, tmp_path, refused):
    model_type = ModelShape.read(family / "hf").model_type
    files = {name: info.file.name for name, info in read_headers(family / "hf").items()}
    for name in few(files):

        def remove(tensors: Tensors, name: str = name) -> None:
            del tensors[name]

        def rename(tensors: Tensors, name: str = name) -> None:
            tensors[name + "_"] = tensors.pop(name)

        def add(tensors: Tensors, name: str = name) -> None:
            tensors[name + "_extra"] = torch.ones(2)

        def reshape(tensors: Tensors, name: str = name) -> None:
            tensors[name] = tensors[name][..., 1:].clone()

        missing = f"{INDEX_FILE} has no tensor {name} "
        extra = f"{files[name]}: 1 tensors do not belong to a {model_type}: .*{name}_extra"
        other_shape = rf"{files[name]}: {name} is \[.*\], config.json asks for \["
        cases = [(remove, missing), (rename, missing), (add, extra), (reshape, other_shape)]
        for change, message in cases:
            source = copy(family / "hf", tmp_path / "hf")
            edit(source, name, change)
            refused(to_megatron, source, message)


def test_a_wrong_dtype_of_hugging_face_is_named_with_its_file(family, tmp_path, refused):
    files = {name: info.file.name for name, info in read_headers(family / "hf").items()}
    sources = defaultdict(set)
    for piece in pieces(ModelShape.read(family / "hf")):
        key, _ = keys.key_of(piece.megatron)
        sources[key].add(piece.hf)
    # Tensors that become one: query, key and value; gate and up; the experts of a layer.
    fused = set()
    for names in sources.values():
        if len(names) > 1:
            fused |= names
    for name in (min(fused), max(fused)):

        def halve(tensors: Tensors, name: str = name) -> None:
            tensors[name] = tensors[name].half()

        def make_int(tensors: Tensors, name: str = name) -> None:
            tensors[name] = tensors[name].int()

        before_layers = name.rpartition("layers.")[0]
        source = copy(family / "hf", tmp_path / "hf")
        edit(source, name, halve)
        refused(to_megatron, source, f"safetensors: .*{before_layers}.* (F16|F32), but .*F(16|32)")
        edit(source, name, make_int)
        refused(to_megatron, source, f"{files[name]}: {name} is I32; dequantize")


def test_a_wrong_key_of_megatron_is_named_with_its_file(family, tmp_path, refused):
    stored = load_stock(family / "megatron/release")
    model = family / "megatron" / "hf"
    for key in few(stored):
        tensor = stored[key]
        others = {other: stored[other] for other in stored if other != key}
        name = re.escape(key)
        if ".experts.experts." in key:  # one name for each expert
            name = name.replace(r"experts\.experts", r"experts\.experts\.\d", 1)
        missing = rf"\.metadata has no {name} \["
        extra = r"__0_0\.distcp: .*_extra and \d others do not"
        other_shape = rf"__0_0\.distcp: {name} is \[.*config.json asks for"
        other_dtype = rf"__0_0\.distcp: {name} is I32; dequantize"
        cases = [
            (others, missing),
            (others | {key + "_": tensor}, missing),
            (stored | {key + "_extra": torch.ones(2, 2)}, extra),
            (stored | {key: tensor[..., 1:]}, other_shape),
            (stored | {key: tensor.int()}, other_dtype),
        ]
        for state, message in cases:
            source = save_stock(tmp_path / "megatron", state)
            refused(to_huggingface, source, message, "--hf-checkpoint", model)
            shutil.rmtree(source)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A directory with hf without a manifest, and with megatron, old_megatron and back with one.

    old_megatron has the form of megatron-core 0.16.
    """
    directory = tmp_path_factory.mktemp("llama")
    make(directory / "hf", "llama", shards=True)
    assert to_megatron(directory / "hf", directory / "megatron") == 0
    shutil.copytree(directory / "megatron", directory / "old_megatron")
    turn_into_old_form(directory / "old_megatron/release")
    (directory / "old_megatron/manifest.json").unlink()
    manifest.write(directory / "old_megatron")
    assert to_huggingface(directory / "megatron", directory / "back") == 0
    assert to_huggingface(directory / "old_megatron", directory / "old_back") == 0
    assert contents(directory / "old_back") == contents(directory / "back")
    return directory


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
    del metadata.state_dict_metadata[torch_dist.COMMON_STATE]
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
            release, torch_dist.COMMON_STATE, torch_pickle.EMPTY_OBJECT[:-9]
        ),
        r"__0_0\.distcp: common_state/shard_0_1: no container",
    ),
    "empty object": (
        "megatron",
        lambda release: move_container(release, torch_dist.COMMON_STATE, torch_pickle.EMPTY_OBJECT),
        r"__0_0\.distcp: common_state/shard_0_1: it holds a NoneType, not a dictionary",
    ),
}


@pytest.mark.parametrize("kind", COMMON_DAMAGE)
def test_a_damaged_common_state_is_refused(llama, tmp_path, refused, kind):
    which, damage, message = COMMON_DAMAGE[kind]
    source = copy(llama / which, tmp_path / "megatron")
    damage(source / "release")
    refused(to_huggingface, source, message, "--no-checksums")


class Evil:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, ...]:
        return exec, (f"open({str(self.witness)!r}, 'w')",)


@pytest.fixture
def evil(tmp_path: Path) -> Iterator[bytes]:
    """A pickle that makes a file when it is loaded, and the check that it was not."""
    witness = tmp_path / "witness"
    pickled = pickle.dumps({"args": Evil(witness)}, 2)
    pickle.loads(pickled)
    assert witness.exists()
    witness.unlink()
    yield pickled
    assert not witness.exists()


@pytest.mark.parametrize(
    "which, place",
    [
        ("megatron", ".metadata"),
        ("megatron", "output_layer.weight"),
        ("megatron", torch_dist.COMMON_STATE),
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
    message = rf"{re.escape(place)}: .*pickle names \w+\.exec.*refused"
    refused(to_huggingface, source, message, "--no-checksums")
    if place == ".metadata":
        assert to_huggingface(source, tmp_path / "dry", "--dry-run") == 2


@pytest.mark.parametrize(
    "family_name, mtp, name, of",
    [
        ("qwen2", None, "lm_head.weight", "model.embed_tokens.weight"),
        ("glm4_moe", True, "model.layers.4.embed_tokens.weight", "model.embed_tokens.weight"),
        ("deepseek_v3", True, "model.layers.4.shared_head.head.weight", "lm_head.weight"),
    ],
)
def test_a_repeat_that_differs_is_refused(tmp_path, refused, family_name, mtp, name, of):
    source = make(tmp_path / "hf", family_name, mtp=mtp)

    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[of].clone()
        tensors[name][-1, -1] += 1

    edit(source, of, change)
    refused(to_megatron, source, rf"model\.safetensors: {name} has to repeat {of}, but differs")


def test_the_two_names_of_a_norm_have_to_agree(llama, tmp_path, refused):
    stored = load_stock(llama / "megatron/release")
    name = "decoder.layers.2.mlp.linear_fc1.layer_norm_weight"
    other = "decoder.layers.2.pre_mlp_layernorm.weight"
    source = save_stock(tmp_path / "same", stored)
    assert to_huggingface(source, tmp_path / "fine", "--hf-checkpoint", llama / "hf") == 0
    source = save_stock(tmp_path / "other", stored | {other: stored[name] + 1})
    message = rf"__0_0\.distcp: {other} has to repeat {name}, but differs"
    refused(to_huggingface, source, message, "--hf-checkpoint", llama / "hf")


@pytest.mark.parametrize("form", FORMS)
def test_a_tensor_stored_in_two_ways_is_refused(llama, tmp_path, refused, form):
    stored = load_stock(llama / "megatron/release")
    name = "mlp.linear_fc2.weight"
    stacked = torch.stack([stored[f"decoder.layers.{layer}.{name}"] for layer in range(4)])
    state = stored | {f"decoder.layers.{name}": stacked}
    source = save_stock(tmp_path / "twice", state, form=form)
    message = r"layers\.0\.mlp\.linear_fc2\.weight is stored twice"
    refused(to_huggingface, source, message, "--hf-checkpoint", llama / "hf")


@pytest.mark.parametrize("half", [torch.zeros(48, 32).bfloat16(), torch.zeros(40, 32), None])
def test_halves_of_one_tensor_have_to_match(llama, tmp_path, refused, half):
    state = load_stock(llama / "megatron/release")
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    gate_and_up = state.pop(name)
    state[f"{name}_w"] = gate_and_up[:48]
    if half is not None:
        state[f"{name}_v"] = half
    source = save_stock(tmp_path / "halves", state)
    message = r"layers\.1\.mlp\.linear_fc1\.weight is stored as .*, not as two equal halves"
    refused(to_huggingface, source, message, "--hf-checkpoint", llama / "hf")


def test_a_dtype_that_cannot_be_cast_is_refused_before_anything_is_written(
    llama, tmp_path, refused
):
    source = copy(llama / "hf", tmp_path / "hf")
    edit(source, NORM, lambda tensors: tensors.update({NORM: tensors[NORM].double()}))
    assert to_megatron(source, tmp_path / "megatron") == 0
    message = f"distcp: {NORM} is F64; BF16 is made of"
    refused(to_huggingface, tmp_path / "megatron", message, "--dtype", "BF16")


def test_what_is_no_checkpoint_is_refused(tmp_path, refused):
    (tmp_path / "empty").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "empty" / "adapter_model.safetensors")
    for convert in (to_megatron, to_huggingface):
        refused(convert, tmp_path / "empty", "is no checkpoint")
        refused(convert, tmp_path / "nowhere", "is no directory")


def test_the_other_direction_is_named(llama, refused):
    refused(to_megatron, llama / "megatron", "is torch_dist already; give a Hugging Face directory")
    refused(to_huggingface, llama / "hf", "is Hugging Face already; give a Megatron directory")
