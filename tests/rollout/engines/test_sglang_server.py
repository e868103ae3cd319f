"""What a run's configuration makes of the command and the client of an SGLang server."""

import json
from pathlib import Path
from typing import Any

import pytest

from nanoslime.config import ModelConfig, RolloutConfig, RunConfig, TrainingConfig
from nanoslime.engine_kind import EngineStart
from nanoslime.processes.child import ChildProcess
from nanoslime.rollout.engines.sglang_client import SGLangEngine
from nanoslime.rollout.engines.sglang_server import SGLangServer
from nanoslime.types import GenerateRequest
from tests.serving import VOCAB_SIZE

pytestmark = pytest.mark.sglang


def made(model: Path, log: Path, index: int = 0, **config: Any) -> SGLangServer:
    rollout = RolloutConfig(engine_tp_size=2, request_deadline_s=77.0)
    run = RunConfig(seed=3, rollout=rollout, model=ModelConfig(dtype="float32"), **config)
    return SGLangServer(EngineStart(run, index, model, device="cpu", host="127.0.0.1", log=log))


def flags(server: SGLangServer) -> dict[str, str]:
    """The value after each --name of the command."""
    words = server.command
    found = {}
    for name, value in zip(words, [*words[1:], ""], strict=True):
        if name.startswith("--"):
            found[name.removeprefix("--")] = value
    return found


def test_the_server_is_that_of_the_run(tiny_model: Path, tmp_path: Path) -> None:
    found = flags(made(tiny_model, tmp_path / "log"))
    assert found["model-path"] == str(tiny_model)
    assert (found["dtype"], found["tp-size"], found["host"]) == ("float32", "2", "127.0.0.1")
    assert "enable-return-routed-experts" not in found
    assert "enable-fp32-lm-head" in found  # on a CPU, too


def test_no_two_engines_and_no_two_runs_sample_alike(tiny_model: Path, tmp_path: Path) -> None:
    """Each has a seed of its own, by the seed of the run and its index."""
    log = tmp_path / "log"
    first, second = (flags(made(tiny_model, log, index)) for index in (0, 1))
    assert (first["random-seed"], second["random-seed"]) == ("3000", "3001")
    assert first["port"] != second["port"]


def test_routed_experts_are_asked_for_by_r3_only(tiny_model: Path, tmp_path: Path) -> None:
    for replay, is_asked in (("none", False), ("R2", False), ("R3", True)):
        server = made(tiny_model, tmp_path / "log", training=TrainingConfig(routing_replay=replay))
        assert ("enable-return-routed-experts" in flags(server)) == is_asked


def test_the_client_has_the_deadline_and_the_size_of_the_engine(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadlines = []
    monkeypatch.setattr(
        ChildProcess,
        "wait_until",
        lambda self, ready, what, deadline_s: deadlines.append(deadline_s),
    )
    server = made(tiny_model, tmp_path / "log")
    server.command = ["true"]
    engine = server.start(deadline_s=55.0)
    server.close()
    assert deadlines == [55.0]
    assert (engine.request_deadline_s, engine.world_size) == (77.0, 2)
    assert engine.vocab_size == VOCAB_SIZE and engine.experts_of is None


def test_a_request_is_told_whole() -> None:
    engine = SGLangEngine(name="engine-0", url="http://127.0.0.1:9", log="log", vocab_size=9)
    request = GenerateRequest(
        [1, 2],
        n=3,
        max_new_tokens=4,
        temperature=0.5,
        top_p=0.6,
        top_k=7,
        stop_token_ids=(8,),
    )
    body = json.loads(engine._generate_body(request))
    assert body["input_ids"] == [1, 2] and body["return_logprob"] is True
    sampling = body["sampling_params"]
    expected = {"n": 3, "max_new_tokens": 4, "temperature": 0.5, "top_p": 0.6, "top_k": 7}
    assert {name: sampling[name] for name in expected} == expected
    assert sampling["stop_token_ids"] == [8]
