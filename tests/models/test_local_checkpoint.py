"""The checkpoint of a run, as people bring it: taken, or refused in one line with the reason.

The plan, the converter, FSDP and Megatron read through the same functions; the last two have
their own tests of that.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanoslime.config import ModelConfig, RolloutConfig, RunConfig
from nanoslime.models.local_checkpoint import with_local_checkpoint
from nanoslime.types import RunError
from tests.serving import save_tiny_model
from tests.tools.checkpoints import to_megatron

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM = "model.norm.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"


def resolve(directory: Path, **model: Any) -> None:
    config = RunConfig(model=ModelConfig(hf_checkpoint=str(directory), **model))
    with_local_checkpoint(config, download=False)


def refusal(directory: Path, **model: Any) -> str:
    with pytest.raises(RunError) as error:
        resolve(directory, **model)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "tied", seed=0, tie=True)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model", seed=0)


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def edit_json(file: Path, **changes: Any) -> None:
    values = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(values | changes))


def shard(directory: Path, folder: str = "") -> None:
    """Two files and an index in place of the one file."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[:10], names[10:]), 1):
        file = f"{folder}model-0000{number}-of-00002.safetensors"
        (directory / file).parent.mkdir(exist_ok=True)
        save_file({name: tensors[name] for name in part}, directory / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    edit_json(directory / INDEX, metadata={}, weight_map=weight_map)


def test_a_tied_head_that_the_files_repeat_is_taken(tied: Path) -> None:
    edit(tied, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    resolve(tied)


def test_a_tied_head_that_the_files_leave_out_costs_no_reading_of_the_embedding(
    tied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []
    monkeypatch.setattr("nanoslime.models.checkpoint_files.same_content", compared.append)
    resolve(tied)
    assert compared == []


def test_one_other_number_in_a_tied_head_is_refused_before_anything_starts(tied: Path) -> None:
    """transformers would not tie it, SGLang and Megatron would."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()
        tensors[HEAD][-1, -1] += 1e-6

    edit(tied, change)
    said = refusal(tied)
    assert f"{tied}/model.safetensors: {HEAD} has to repeat {EMBEDDING}, but differs" in said
    edit_json(tied / "config.json", tie_word_embeddings=False)
    resolve(tied)


def test_rotary_frequencies_in_the_files_are_not_the_models(model: Path) -> None:
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]
    edit(model, lambda tensors: tensors.update({name: torch.ones(8) for name in names}))
    resolve(model)
    edit(model, lambda tensors: tensors.update({"model.rope.freqs": torch.ones(8)}))
    assert "1 tensors do not belong to a qwen3: ['model.rope.freqs']" in refusal(model)


def missing(directory: Path) -> None:
    edit(directory, lambda tensors: tensors.pop(NORM))


def misshapen(directory: Path) -> None:
    edit(directory, lambda tensors: tensors.update({NORM: torch.ones(3)}))


def other_vocabulary(directory: Path) -> None:
    edit_json(directory / "config.json", vocab_size=300)


def gptq_config(directory: Path) -> None:
    edit_json(directory / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def awq_files(directory: Path) -> None:
    packed = QUERY.replace("weight", "qweight")
    edit(directory, lambda tensors: tensors.update({packed: tensors.pop(QUERY).int()}))


def fp8_files(directory: Path) -> None:
    edit(directory, lambda tensors: tensors.update({QUERY: tensors[QUERY].to(torch.float8_e4m3fn)}))


def fp8_with_scales(directory: Path) -> None:
    edit(directory, lambda tensors: tensors.update({f"{QUERY}_scale_inv": torch.ones(1, 1)}))


def in_a_subfolder(directory: Path) -> None:
    shard(directory, "sub/")


def outside(directory: Path) -> None:
    shard(directory)
    file = directory / INDEX
    file.write_text(file.read_text().replace('"model-00002', '"../model-00002'))


def a_file_is_missing(directory: Path) -> None:
    shard(directory)
    (directory / "model-00002-of-00002.safetensors").unlink()


def index_without_map(directory: Path) -> None:
    shard(directory)
    edit_json(directory / INDEX, weight_map=None)


def index_that_is_a_list(directory: Path) -> None:
    shard(directory)
    (directory / INDEX).write_text("[]")


def index_without_metadata(directory: Path) -> None:
    shard(directory)
    weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def no_index(directory: Path) -> None:
    shard(directory)
    (directory / INDEX).unlink()


def pickled(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def git_lfs_pointer(directory: Path) -> None:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12\n"
    (directory / "model.safetensors").write_text(text)


def unreadable(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").mkdir()


def adapter(directory: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (directory / name).unlink()
    (directory / "adapter_config.json").write_text("{}")
    save_file({"a": torch.ones(1)}, directory / "adapter_model.safetensors")


REFUSED = {
    missing: f"model.safetensors has no tensor {NORM} [64]",
    misshapen: f"model.safetensors: {NORM} is [3], config.json asks for [64]",
    other_vocabulary: f"{EMBEDDING} is [320, 64], config.json asks for [300, 64]",
    gptq_config: "config.json: gptq weights are not supported; dequantize",
    awq_files: f"model.safetensors: {QUERY.replace('weight', 'qweight')} belongs to quantized",
    fp8_files: f"model.safetensors: {QUERY} is F8_E4M3; dequantize",
    fp8_with_scales: f"model.safetensors: {QUERY}_scale_inv belongs to quantized weights",
    in_a_subfolder: f"{INDEX} says that {HEAD} is in 'sub/model-00001-of-00002.safetensors'; only",
    outside: "is in '../model-00002-of-00002.safetensors'; only files beside the index are read",
    a_file_is_missing: f"model-00002-of-00002.safetensors is missing; {INDEX} lists it",
    index_without_map: f"{INDEX} has no weight_map",
    index_that_is_a_list: f"{INDEX} has no weight_map",
    index_without_metadata: f"{INDEX} has no metadata",
    no_index: "holds model-00001-of-00002.safetensors, but neither model.safetensors nor",
    pickled: "holds pytorch_model.bin, but neither model.safetensors nor model.safetensors.index",
    git_lfs_pointer: "model.safetensors is a pointer of Git LFS",
    unreadable: "model.safetensors cannot be read: Is a directory",
    adapter: "is no checkpoint but an adapter without its base model; merge",
}


@pytest.mark.parametrize("damage", REFUSED, ids=lambda damage: damage.__name__)
def test_plan_and_converter_refuse_for_the_same_reason(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    damage(model)
    said = refusal(model)
    assert REFUSED[damage] in said
    assert str(model) in said
    assert to_megatron(model, tmp_path / "out") == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"hf_to_megatron: {said}"


def test_files_in_half_precision_are_taken(model: Path) -> None:
    edit(model, lambda tensors: tensors.update({n: t.half() for n, t in tensors.items()}))
    resolve(model)


def add_token(directory: Path, token_id: int) -> None:
    file = directory / "tokenizer.json"
    edit_json(file, added_tokens=[{"id": token_id, "content": "<x>"}])


def declare_token(directory: Path, token_id: int) -> None:
    file = directory / "tokenizer_config.json"
    edit_json(file, added_tokens_decoder={str(token_id): {"content": "<x>"}})


def list_token(directory: Path, token_id: int) -> None:
    (directory / "added_tokens.json").write_text(json.dumps({"<x>": token_id}))


def use_vocab_json(directory: Path, token_id: int) -> None:
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.json").write_text(json.dumps({"a": 0, "b": token_id}))


def use_unigram(directory: Path, token_id: int) -> None:
    pieces = [[str(number), 0.0] for number in range(token_id + 1)]
    edit_json(directory / "tokenizer.json", model={"type": "Unigram", "vocab": pieces})


@pytest.mark.parametrize("add", [add_token, declare_token, list_token, use_vocab_json, use_unigram])
def test_a_tokenizer_of_more_tokens_than_the_embedding_has_rows_is_refused(
    model: Path, add: Callable[[Path, int], None]
) -> None:
    """The embedding has 320 rows."""
    add(model, 319)
    resolve(model)
    if add is use_vocab_json:
        (model / "tokenizer.json").write_text("{}")
    add(model, 320)
    said = refusal(model)
    assert " has 321 tokens, and the model's vocab_size=320 rows of embeddings are fewer" in said


def moonlight(directory: Path) -> None:
    """A tokenizer as Moonlight and Kimi have it: a vocabulary of tiktoken, read by code."""
    (directory / "tokenizer.json").unlink()
    (directory / "tiktoken.model").write_text("YQ== 0\n")
    (directory / "tokenization_moonshot.py").write_text("")
    (directory / "tokenizer_config.json").write_text("{}")
    auto_map = {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]}
    edit_json(directory / "tokenizer_config.json", auto_map=auto_map)


def test_a_tokenizer_that_is_code_has_to_be_trusted(model: Path) -> None:
    moonlight(model)
    said = refusal(model)
    assert "its tokenizer is code of the checkpoint" in said
    assert "tokenization_moonshot.TikTokenTokenizer" in said
    assert "--trust-remote-code" in said
    resolve(model, trust_remote_code=True)
    (model / "tokenization_moonshot.py").unlink()
    said = refusal(model, trust_remote_code=True)
    assert f"{model}/tokenization_moonshot.py is missing; tokenizer_config.json names" in said


def test_a_vocabulary_of_tiktoken_alone_is_refused(model: Path) -> None:
    """transformers would read it, and guess how text is split."""
    moonlight(model)
    (model / "tokenizer_config.json").write_text("{}")
    for trusted in (False, True):
        said = refusal(model, trust_remote_code=trusted)
        assert "holds tiktoken.model, which does not say how text is split" in said


def test_trusted_code_of_another_repository_is_refused(model: Path) -> None:
    auto_map = {"AutoConfig": "someone/code--configuration_x.XConfig"}
    edit_json(model / "config.json", auto_map=auto_map)
    resolve(model)
    said = refusal(model, trust_remote_code=True)
    assert "config.json names code of another repository, someone/code" in said


def test_a_tokenizer_is_needed_unless_rollouts_are_replayed(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    assert "holds no tokenizer: none of tokenizer.json, tokenizer.model" in refusal(model)
    config = RunConfig(model=ModelConfig(hf_checkpoint=str(model)))
    replaying = replace(config, rollout=RolloutConfig(load_rollouts="runs/a"))
    with_local_checkpoint(replaying, download=False)
