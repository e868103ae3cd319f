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
from nanoslime.storage.safetensors_file import INDEX_FILE, read_headers
from tests.models.hf import FAMILIES
from tests.tools.checkpoints import (
    Tensors,
    contents,
    edit,
    load_stock,
    make,
    save_stock,
    to_huggingface,
    to_megatron,
)
from tools.conversion import keys, torch_pickle
from tools.conversion.plan import HEADERS


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> Path:
    """A directory with hf, a sharded checkpoint, and megatron, the same as torch writes it."""
    directory = tmp_path_factory.mktemp(request.param)
    source = make(directory / "hf", request.param, shards=True)
    assert to_megatron(source, directory / "ours") == 0
    names = {piece.megatron for piece in pieces(ModelShape.read(source), ModelPartition())}
    held = {keys.key_of(name)[0] for name in names}
    stored = {
        key: tensor for key, tensor in load_stock(directory / "ours/release").items() if key in held
    }
    save_stock(directory / "megatron/release", stored)
    shutil.copytree(directory / "ours/hf", directory / "megatron/hf")
    assert to_huggingface(directory / "megatron", directory / "back") == 0
    return directory


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
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


def test_a_wrong_tensor_of_hugging_face_is_named_with_its_file(family, tmp_path, refused):
    shape = ModelShape.read(family / "hf")
    parts = defaultdict(list)
    for piece in pieces(shape):
        parts[keys.key_of(piece.megatron)[0]].append(piece.hf)
    fused = {hf for found in parts.values() for hf in found if len(set(found)) > 1}
    files = {name: info.file.name for name, info in read_headers(family / "hf").items()}
    chosen = random.Random(0).sample(sorted(files), 4)
    for name in chosen:

        def reshape(t: Tensors, name: str = name) -> None:
            t[name] = t[name][..., 1:].clone()

        for change, message in (
            (lambda t, name=name: t.pop(name), f"{INDEX_FILE} has no tensor {name} "),
            (
                lambda t, name=name: t.update({name + "_": t.pop(name)}),
                f"{INDEX_FILE} has no tensor {name} ",
            ),
            (
                lambda t, name=name: t.update({name + "_extra": torch.ones(2)}),
                f"{files[name]}: 1 tensors do not belong to a {shape.model_type}: .*{name}_extra",
            ),
            (reshape, rf"{files[name]}: {name} is \[.*\], config.json asks for \["),
        ):
            source = copy(family / "hf", tmp_path / "hf")
            edit(source, name, change)
            refused(to_megatron, source, message)
    for name in (
        min(fused),
        max(fused),
    ):  # parts of one tensor: query, key, value; gate, up; experts
        source = copy(family / "hf", tmp_path / "hf")
        edit(source, name, lambda t, name=name: t.update({name: t[name].half()}))
        refused(
            to_megatron,
            source,
            f"safetensors: .*{name.rpartition('layers.')[0]}.* (F16|F32), but .*F(16|32)",
        )
        edit(source, name, lambda t, name=name: t.update({name: t[name].int()}))
        refused(to_megatron, source, f"{files[name]}: {name} is I32; dequantize")


def test_a_wrong_key_of_megatron_is_named_with_its_file(family, tmp_path, refused):
    stored = load_stock(family / "megatron/release")
    side = family / "megatron" / "hf"
    for key in random.Random(0).sample(sorted(stored), 4):
        rest = {name: tensor for name, tensor in stored.items() if name != key}
        layer, expert = re.escape(key).partition("experts\\.experts")[::2]
        name = rf"{layer}experts\.experts\.\d{expert}" if expert else layer
        for number, (state, message) in enumerate(
            [
                (rest, rf"\.metadata has no {name} \["),
                (rest | {key + "_": stored[key]}, rf"\.metadata has no {name} \["),
                (
                    stored | {key + "_extra": torch.ones(2, 2)},
                    r"__0_0\.distcp: .*_extra and \d others do not",
                ),
                (
                    stored | {key: stored[key][..., 1:]},
                    rf"__0_0\.distcp: {name} is \[.*config.json asks for",
                ),
                (stored | {key: stored[key].int()}, rf"__0_0\.distcp: {name} is I32; dequantize"),
            ]
        ):
            source = save_stock(tmp_path / f"{number}", state)
            refused(to_huggingface, source, message, "--hf-checkpoint", side)
            shutil.rmtree(source)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A directory with megatron and back, each with a manifest, and hf without one."""
    directory = tmp_path_factory.mktemp("llama")
    make(directory / "hf", "llama", shards=True)
    assert to_megatron(directory / "hf", directory / "megatron") == 0
    assert to_huggingface(directory / "megatron", directory / "back") == 0
    return directory


@pytest.mark.parametrize("which", ["megatron", "back"])
def test_a_flipped_bit_anywhere_is_found(llama, tmp_path, refused, which):
    convert = to_huggingface if which == "megatron" else to_megatron
    source, rng = copy(llama / which, tmp_path / "source"), random.Random(1)
    names = contents(source)
    assert {"manifest.json"} < names.keys()
    if which == "megatron":
        kinds = {
            "release/.metadata",
            "release/common.pt",
            "release/metadata.json",
            "release/__0_0.distcp",
        }
        assert (
            kinds | {"hf/config.json", f"hf/{HEADERS}", "latest_checkpointed_iteration.txt"}
            <= names.keys()
        )
    for name in sorted(names.keys() - {"manifest.json"}):
        good = (source / name).read_bytes()
        for place in (0, len(good) - 1, rng.randrange(len(good)), rng.randrange(len(good))):
            bad = bytearray(good)
            bad[place] ^= 1 << rng.choice([rng.randrange(8), 7])
            (source / name).write_bytes(bad)
            refused(convert, source, re.escape(name.rpartition("/")[2]))
        (source / name).write_bytes(good)


@pytest.mark.parametrize("which", ["megatron", "back"])
def test_a_flipped_bit_of_the_manifest_is_found_or_harmless(llama, tmp_path, capsys, which):
    convert = to_huggingface if which == "megatron" else to_megatron
    source, rng = copy(llama / which, tmp_path / "source"), random.Random(2)
    assert convert(source, tmp_path / "expected") == 0
    expected = contents(tmp_path / "expected")
    good = (source / "manifest.json").read_bytes()
    places = [
        good.index(b'"files"') + 2,
        good.index(b'"bytes"') + 2,
        good.index(b'"xxh3_128":') + 2,
    ]
    for place in places + [rng.randrange(len(good)) for _ in range(20)]:
        bad = bytearray(good)
        bad[place] ^= 1 << rng.randrange(8)
        (source / "manifest.json").write_bytes(bad)
        code = convert(source, tmp_path / "out")
        assert code in (0, 2)
        if code == 0:
            assert contents(tmp_path / "out") == expected
            shutil.rmtree(tmp_path / "out")
        assert not (tmp_path / "out.partial").exists()
        if place in places:
            assert code == 2 and "manifest.json" in capsys.readouterr().err


def last_shard(directory: Path) -> Path:
    return max(directory.glob("*.safetensors"))


def change_index(directory: Path, change: Callable[[dict[str, str]], object]) -> None:
    values = json.loads((directory / INDEX_FILE).read_text())
    change(values["weight_map"])
    (directory / INDEX_FILE).write_text(json.dumps(values))


def twice(directory: Path) -> None:
    first, second = sorted(directory.glob("*.safetensors"))[1:3]
    name = next(n for n, info in read_headers(directory).items() if info.file == first)
    edit(
        directory,
        next(n for n, info in read_headers(directory).items() if info.file == second),
        lambda t: t.update({name: torch.ones(1)}),
    )


NORM = "model.norm.weight"
HF_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (
        lambda d: os.truncate(last_shard(d), last_shard(d).stat().st_size - 1),
        "is truncated",
    ),
    "header only": (lambda d: os.truncate(last_shard(d), 100), "truncated or not safetensors"),
    "missing shard": (lambda d: last_shard(d).unlink(), r"model-\d+-of-\d+.safetensors is missing"),
    "absent file": (
        lambda d: change_index(d, lambda m: m.update({NORM: "model-x.safetensors"})),
        "model-x.safetensors is missing; model.safetensors.index.json lists it",
    ),
    "another file": (
        lambda d: change_index(d, lambda m: m.update({NORM: min(set(m.values()) - {m[NORM]})})),
        f"does not hold {NORM}, although",
    ),
    "unlisted": (
        lambda d: change_index(d, lambda m: m.pop(NORM)),
        f"holds {NORM}, which .* does not list",
    ),
    "twice": (twice, r"00003.* holds model.*, and so does .*00002"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json does not exist"),
}


@pytest.mark.parametrize("kind", HF_DAMAGE)
def test_damaged_hugging_face_files_are_refused(llama, tmp_path, refused, kind):
    source = copy(llama / "hf", tmp_path / "hf")
    damage, message = HF_DAMAGE[kind]
    damage(source)
    refused(to_megatron, source, message)


def rewrite(file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))


MEGATRON_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (
        lambda d: rewrite(d / "release/__0_0.distcp", lambda b: b[:-1]),
        r"__0_0\.distcp: \S+: truncated",
    ),
    "missing chunks": (
        lambda d: (d / "release/__0_0.distcp").unlink(),
        r"__0_0\.distcp is missing",
    ),
    "missing metadata": (lambda d: (d / "release/.metadata").unlink(), "is no checkpoint"),
    "missing common": (lambda d: (d / "release/common.pt").unlink(), r"common\.pt is missing"),
    "cut common": (lambda d: rewrite(d / "release/common.pt", lambda b: b[:-9]), r"common\.pt"),
    "no number": (
        lambda d: (d / "latest_checkpointed_iteration.txt").write_text("relea5e"),
        r"latest_checkpointed_iteration\.txt says 'relea5e'",
    ),
    "no iteration": (
        lambda d: (d / "latest_checkpointed_iteration.txt").write_text("7"),
        "is no checkpoint",
    ),
    "no config": (lambda d: (d / "hf/config.json").unlink(), "say with --hf-checkpoint DIR"),
    "headers lead outside": (
        lambda d: rewrite(d / "hf" / HEADERS, lambda b: b.replace(b'"model-', b'"../model-')),
        "names '../model-.*no file of that directory",
    ),
    "headers of another model": (
        lambda d: rewrite(
            d / "hf" / HEADERS, lambda b: b.replace(b"model.norm.w", b"model.norm.W")
        ),
        r"safetensors has model.norm.Weight \[32\], but .* has nothing of that name",
    ),
}


@pytest.mark.parametrize("kind", MEGATRON_DAMAGE)
def test_damaged_megatron_files_are_refused(llama, tmp_path, refused, kind):
    source = copy(llama / "megatron", tmp_path / "megatron")
    damage, message = MEGATRON_DAMAGE[kind]
    damage(source)
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


@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp"])
def test_a_malicious_pickle_is_refused_and_not_executed(llama, tmp_path, refused, evil, name):
    source = copy(llama / "megatron", tmp_path / "megatron")
    file = source / "release" / name
    content = evil if name == ".metadata" else b"".join(torch_pickle.archive(evil))
    if name == "__0_0.distcp":  # in the place of one chunk
        metadata = pickle.loads((source / "release/.metadata").read_bytes())
        place = next(
            p for index, p in metadata.storage_data.items() if index.fqn == "output_layer.weight"
        )
        before = file.read_bytes()
        assert len(content) <= place.length
        content = before[: place.offset] + content.rjust(place.length, b" ")
        content += before[len(content) :]
    file.write_bytes(content)
    refused(
        to_huggingface,
        source,
        rf"{re.escape(name)}: .*pickle names \w+\.exec.*refused",
        "--no-checksums",
    )
    if name == ".metadata":
        assert to_huggingface(source, tmp_path / "dry", "--dry-run") == 2


@pytest.mark.parametrize(
    "family_name, how, name, of",
    [
        ("qwen2", {}, "lm_head.weight", "model.embed_tokens.weight"),
        (
            "glm4_moe",
            {"mtp": True},
            "model.layers.4.embed_tokens.weight",
            "model.embed_tokens.weight",
        ),
        ("deepseek_v3", {"mtp": True}, "model.layers.4.shared_head.head.weight", "lm_head.weight"),
    ],
)
def test_a_repeat_that_differs_is_refused(tmp_path, refused, family_name, how, name, of):
    source = make(tmp_path / "hf", family_name, **how)

    def change(t: Tensors) -> None:
        t[name] = t[of].clone()
        t[name][-1, -1] += 1

    edit(source, of, change)
    refused(to_megatron, source, rf"model\.safetensors: {name} has to repeat {of}, but differs")


def test_the_two_names_of_a_norm_have_to_agree(llama, tmp_path, refused):
    stored = load_stock(llama / "megatron/release")
    name, other = (
        f"decoder.layers.2.{x}"
        for x in ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
    )
    source = save_stock(tmp_path / "same", stored)
    assert to_huggingface(source, tmp_path / "fine", "--hf-checkpoint", llama / "hf") == 0
    source = save_stock(tmp_path / "other", stored | {other: stored[name] + 1})
    message = rf"__0_0\.distcp: {other} has to repeat {name}, but differs"
    refused(to_huggingface, source, message, "--hf-checkpoint", llama / "hf")


def test_a_tensor_stored_in_two_ways_is_refused(llama, tmp_path, refused):
    stored = load_stock(llama / "megatron/release")
    name = "mlp.linear_fc2.weight"
    stacked = torch.stack([stored[f"decoder.layers.{i}.{name}"] for i in range(4)])
    source = save_stock(tmp_path / "twice", stored | {f"decoder.layers.{name}": stacked})
    refused(
        to_huggingface,
        source,
        r"layers\.0\.mlp\.linear_fc2\.weight is stored twice",
        "--hf-checkpoint",
        llama / "hf",
    )


@pytest.mark.parametrize("half", [torch.zeros(48, 32).bfloat16(), torch.zeros(40, 32), None])
def test_halves_of_one_tensor_have_to_match(llama, tmp_path, refused, half):
    stored = load_stock(llama / "megatron/release")
    whole = stored.pop("decoder.layers.1.mlp.linear_fc1.weight")
    halves = {
        "decoder.layers.1.mlp.linear_fc1.weight_w": whole[:48],
        "decoder.layers.1.mlp.linear_fc1.weight_v": half,
    }
    source = save_stock(
        tmp_path / "halves", stored | {k: v for k, v in halves.items() if v is not None}
    )
    message = r"layers\.1\.mlp\.linear_fc1\.weight is stored as .*, not as two equal halves"
    refused(to_huggingface, source, message, "--hf-checkpoint", llama / "hf")


def test_a_dtype_that_cannot_be_cast_is_refused_before_anything_is_written(
    llama, tmp_path, refused
):
    source = copy(llama / "hf", tmp_path / "hf")
    edit(source, NORM, lambda t: t.update({NORM: t[NORM].double()}))
    assert to_megatron(source, tmp_path / "megatron") == 0
    refused(
        to_huggingface,
        tmp_path / "megatron",
        f"distcp: {NORM} is F64; BF16 is made of",
        "--dtype",
        "BF16",
    )


def test_what_is_no_checkpoint_is_refused(tmp_path, refused):
    (tmp_path / "empty").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "empty" / "adapter_model.safetensors")
    for convert in (to_megatron, to_huggingface):
        refused(convert, tmp_path / "empty", "is no checkpoint")
        refused(convert, tmp_path / "nowhere", "is no directory")


def test_the_other_direction_is_named(llama, refused):
    refused(to_megatron, llama / "megatron", "is torch_dist already; give a Hugging Face directory")
    refused(to_huggingface, llama / "hf", "is Hugging Face already; give a Megatron directory")
