"""What the plug-in does to models that no server here runs beside another one."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket
from torch import Tensor

from nanoslime.rollout.engines.embedded_model import EmbeddedEngine
from nanoslime.rollout.engines.sglang_client import AGREE
from nanoslime.rollout.weight_check import checkpoint_shapes
from nanoslime.sealed_bucket import HEADER, HEADER_WORDS, MORE, Place, seal
from nanoslime.shared_bytes import SharedBytes

pytestmark = pytest.mark.sglang
PLUGIN = "nanoslime.rollout.sglang_plugin"
HEAD = "lm_head.weight"
MORE_ROWS = HEAD + MORE


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plug-in imports this module of SGLang for its answers; it takes packages that a CPU
    lacks, and for which a server has stand-ins."""
    names = (
        "BeginWeightUpdateReqOutput",
        "CheckWeightsReqOutput",
        "UpdateWeightFromDiskReqOutput",
    )
    answers = SimpleNamespace(**dict.fromkeys(names, SimpleNamespace))
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.io_struct", answers)
    monkeypatch.delitem(sys.modules, PLUGIN, raising=False)
    yield importlib.import_module(PLUGIN).WeightGuard()
    del sys.modules[PLUGIN]


def updater_of(model: torch.nn.Module, path: Path, *, is_draft: bool) -> Any:
    """As much of SGLang's weight updater as the plug-in asks."""
    return SimpleNamespace(
        get_model=lambda: model,
        get_model_runner=lambda: SimpleNamespace(is_draft_worker=is_draft),
        model_config=SimpleNamespace(model_path=str(path)),
    )


def test_a_model_that_drafts_tokens_keeps_its_weights_and_does_not_stop_the_update(
    guard: Any, tiny_model: Path, tmp_path: Path
) -> None:
    """Its directory has another model than the trainer's, or the layers that nobody trains."""
    model = EmbeddedEngine(str(tiny_model), "float32", "cpu", seed=0)._model
    draft = updater_of(model, tmp_path / "no such model", is_draft=True)
    begun = []

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a draft's weights are loaded")

    guard.begin(begun.append, draft)
    assert begun == [draft]
    assert guard.bucket(refuse, draft, [])[0]
    success, message = guard.disk(refuse, draft, str(tiny_model), "auto")
    assert success and "tensors checked" in message
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    answer = SimpleNamespace(success=True, message="")
    assert guard.answer_end(lambda *_: answer, None, None).success


def test_a_directory_that_the_loader_cannot_take_is_refused_and_the_process_goes_on(
    guard: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang reads the same files again, to go back, and raises what they raise. Memory for what
    is looked at before and after may be short, too."""

    def broken(*arguments: object, **options: object) -> None:
        raise OSError("the disk does not answer")

    model = EmbeddedEngine(str(tiny_model), "float32", "cpu", seed=0)._model
    target = updater_of(model, tiny_model, is_draft=False)
    success, message = guard.disk(broken, target, str(tiny_model), "auto")
    assert not success and "mixture of two versions: OSError: the disk" in message
    monkeypatch.setattr("nanoslime.rollout.weight_check.empty", broken)
    success, message = guard.disk(lambda *_: (True, ""), target, str(tiny_model), "auto")
    assert not success and "mixture of two versions: OSError: the disk" in message


def sealed(flat: Tensor, content: dict[str, Tensor], place: Place) -> dict[str, Any]:
    """A bucket as the plug-in gets it, in the first bytes of `flat`."""
    tensors = {HEADER: torch.zeros(HEADER_WORDS, dtype=torch.int64), **content}
    bucket = FlattenedTensorBucket(list(tensors.items()))
    within = flat[: bucket.flattened_tensor.numel()]
    within.copy_(bucket.flattened_tensor)
    seal(within, place, [(name, t.dtype, t.shape) for name, t in content.items()])
    return {"flattened_tensor": within, "metadata": bucket.metadata}


def refuse(*arguments: object, **options: object) -> None:
    raise AssertionError("nothing is to be loaded")


@pytest.mark.parametrize("form", ["pairs", "flat", "handle"])
def test_rows_of_a_tensor_larger_than_a_bucket_are_loaded_once_all_have_come(
    guard: Any, tiny_model: Path, form: str
) -> None:
    """Pairs come by broadcast, a flat tensor or a handle of one on shared devices; its memory is
    used again."""
    tensors = load_file(tiny_model / "model.safetensors")
    rows = tensors.pop(HEAD)
    loaded: dict[str, Tensor] = {}

    def load(updater: Any, named: list[tuple[str, Tensor]]) -> tuple[bool, str]:
        loaded.update((name, tensor.clone()) for name, tensor in named)
        return True, ""

    target = updater_of(torch.nn.Module(), tiny_model, is_draft=False)
    guard.begin(lambda updater: None, target)
    shared = SharedBytes(1 << 20)
    contents = ({MORE_ROWS: rows[:100]}, {MORE_ROWS: rows[100:300], **tensors}, {HEAD: rows[300:]})
    for number, content in enumerate(contents):
        bucket = sealed(shared.tensor, content, Place(3, number, len(contents)))
        named: Any = bucket
        if form == "pairs":
            named = FlattenedTensorBucket(**bucket).reconstruct_tensors()
        elif form == "handle":
            handle = shared.handle(bucket["flattened_tensor"].numel())
            named = {**bucket, "flattened_tensor": handle}
        assert HEAD not in loaded
        assert guard.bucket(load if number else refuse, target, named)[0]
    assert loaded.keys() == tensors.keys() | {HEAD}
    assert torch.equal(loaded[HEAD], rows)


def test_a_handle_that_opens_nothing_here_is_refused_in_one_sentence_and_nothing_is_loaded(
    guard: Any, tiny_model: Path
) -> None:
    target = updater_of(torch.nn.Module(), tiny_model, is_draft=False)
    guard.begin(lambda updater: None, target)
    shared = SharedBytes(1 << 20)
    bucket = sealed(shared.tensor, load_file(tiny_model / "model.safetensors"), Place(3, 0, 1))
    handle = shared.handle(bucket["flattened_tensor"].numel())
    del bucket["flattened_tensor"], shared
    success, message = guard.bucket(refuse, target, {**bucket, "flattened_tensor": handle})
    assert not success and "\n" not in message
    assert message.startswith("refused: memory of a trainer rank cannot be opened as /proc/")


@pytest.mark.parametrize(
    ("rest", "problem"), [((101, 64), "has shape"), ((100, 3), "Sizes of tensors must match")]
)
def test_rows_that_do_not_make_up_their_tensor_are_refused(
    guard: Any, tiny_model: Path, rest: tuple[int, int], problem: str
) -> None:
    rows = load_file(tiny_model / "model.safetensors")[HEAD]
    start, num_columns = rest
    target = updater_of(torch.nn.Module(), tiny_model, is_draft=False)
    guard.begin(lambda updater: None, target)
    flat = torch.empty(1 << 20, dtype=torch.uint8)
    assert guard.bucket(refuse, target, sealed(flat, {MORE_ROWS: rows[:100]}, Place(3, 0, 2)))[0]
    content = {HEAD: rows[start:, :num_columns]}
    success, message = guard.bucket(refuse, target, sealed(flat, content, Place(3, 1, 2)))
    assert not success and problem in message


def test_an_update_that_ends_before_the_last_rows_is_refused(guard: Any, tiny_model: Path) -> None:
    tensors = load_file(tiny_model / "model.safetensors")
    rows = tensors.pop(HEAD)
    target = updater_of(torch.nn.Module(), tiny_model, is_draft=False)
    guard.begin(lambda updater: None, target)
    flat = torch.empty(1 << 20, dtype=torch.uint8)
    bucket = sealed(flat, {MORE_ROWS: rows[:100], **tensors}, Place(3, 0, 1))
    assert guard.bucket(lambda *_: (True, ""), target, bucket)[0]
    answer = guard.answer_end(lambda *_: SimpleNamespace(success=True, message=""), None, None)
    assert not answer.success and f"1 of 25 tensors missing: {HEAD}" in answer.message


def test_a_model_of_another_dtype_is_not_agreed_on_and_other_checks_are_sglangs(
    guard: Any, tiny_model: Path, tmp_path: Path
) -> None:
    model = EmbeddedEngine(str(tiny_model), "bfloat16", "cpu", seed=0)._model
    updater = updater_of(model, tiny_model, is_draft=False)
    runner = SimpleNamespace(weight_updater=updater)
    manager = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner))
    shapes = checkpoint_shapes(str(tiny_model)).items()

    def asked(dtype: str) -> Any:
        listed = json.dumps([[name, dtype, shape] for name, shape in shapes])
        return guard.answer_agree(None, manager, SimpleNamespace(skip_tensor_list=[AGREE, listed]))

    assert asked("torch.bfloat16").success
    assert asked("torch.bfloat16").message == "25 tensors agreed"
    refused = asked("torch.float32")
    assert not refused.success
    end = "is sent as torch.float32, and the engine was loaded as torch.bfloat16"
    assert refused.message.endswith(end)
    runner.weight_updater = updater_of(model, tmp_path / "no such model", is_draft=False)
    unread = asked("torch.bfloat16")
    assert not unread.success and "tensor names cannot be checked" in unread.message
    for others in (None, ["lm_head"]):
        request = SimpleNamespace(skip_tensor_list=others, action="checksum")
        assert guard.answer_agree(lambda *asked: asked, manager, request) == (manager, request)
