"""What the plug-in does to models that no server here runs beside another one."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanoslime.rollout.engines.embedded_model import EmbeddedEngine

pytestmark = pytest.mark.sglang
PLUGIN = "nanoslime.rollout.sglang_plugin"


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plug-in imports this module of SGLang for its answers; it takes packages that a CPU
    lacks, and for which a server has stand-ins."""
    answers = SimpleNamespace(BeginWeightUpdateReqOutput=SimpleNamespace)
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
