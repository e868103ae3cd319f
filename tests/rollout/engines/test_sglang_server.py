"""What a run's configuration makes of the command and the client of an SGLang server."""

import json
import os
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from jobs.cluster_env import remove_scratch
from nanoslime.config import ModelConfig, RolloutConfig, RunConfig, TrainingConfig
from nanoslime.engine_kind import EngineStart
from nanoslime.processes import shared_memory
from nanoslime.processes.child import ChildProcess
from nanoslime.processes.phases import dump_stacks
from nanoslime.rollout.engines.sglang import SGLang
from nanoslime.rollout.engines.sglang_client import SGLangEngine
from nanoslime.rollout.engines.sglang_server import SGLangServer
from nanoslime.types import GenerateRequest, RunError
from tests.serving import VOCAB_SIZE, ServerOwner

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


def test_each_rank_on_a_cpu_has_a_core_and_none_finds_nccl(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last cores come first, and where there are too few, they are given again."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 5, 6, 7})
    for index, cores in enumerate(("7|6", "5|4", "7|6")):
        env = made(tiny_model, tmp_path / "log", index).env
        assert env["SGLANG_CPU_OMP_THREADS_BIND"] == cores
        assert not Path(env["SGLANG_NCCL_SO_PATH"]).exists()


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
    assert deadlines == [55.0]
    server.close()
    assert (engine.request_deadline_s, engine.world_size) == (77.0, 2)
    assert engine.vocab_size == VOCAB_SIZE and engine.experts_of is None


def test_a_server_that_is_closed_leaves_its_files_in_shared_memory_no_more_than_others_theirs(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it ended. What SGLang names otherwise, or another process, is not its own."""
    monkeypatch.setattr(shared_memory, "_SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(ChildProcess, "wait_until", lambda *asked: None)
    server = made(tiny_model, tmp_path / "log")
    server.command = ["true"]
    server.start(deadline_s=55.0)
    assert server.process is not None
    server.process.wait()
    own = tmp_path / f"sglang_loads_{server.process.pid}-5f1c_0a.shm"
    others = [tmp_path / f"sglang_loads_{server.process.pid}1-5f1c_0a.shm", tmp_path / "psm_1"]
    for file in (own, *others):
        file.touch()
    server.close()
    assert not own.exists() and all(file.exists() for file in others)


def test_files_of_a_server_whose_owner_was_killed_go_with_the_scratch_directory(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir(mode=0o700)
    monkeypatch.setattr(shared_memory, "_SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(ChildProcess, "wait_until", lambda *asked: None)
    monkeypatch.setenv("TMPDIR", str(scratch))
    server = made(tiny_model, tmp_path / "log")
    server.command = ["true"]
    server.start(deadline_s=55.0)
    assert server.process is not None
    own = tmp_path / f"sglang_loads_{server.process.pid}-5f1c_0a.shm"
    other = tmp_path / "sglang_loads_1-5f1c_0a.shm"
    own.touch()
    other.touch()
    remove_scratch(scratch)
    assert not own.exists() and other.exists()
    server.close()


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


def test_a_request_without_the_key_is_refused(sglang_engine: SGLangEngine) -> None:
    """What loads weights, ends requests or tells of the run is not for other users of the machine;
    neither a path that only looks like the health check's nor a Host that does opens it."""
    wrong = {"Authorization": "Bearer " + "0" * 64}
    closed = (
        "generate v1/completions model_info server_info v1/models pause_generation flush_cache "
        "update_weights_from_disk update_weights_from_tensor update_weights_from_distributed "
        "init_weights_update_group update_weight_version release_memory_occupation openapi.json "
        "abort_request health/../model_info /health/../model_info"
    ).split()
    for path in closed:
        for method in ("GET", "POST"):
            for headers in ({}, wrong, {"Host": "127.0.0.1/health?"}, {"Authorization": "Bearer "}):
                url = f"{sglang_engine.url}/{path}"
                prepared = requests.Request(method, url, headers=headers, json={}).prepare()
                prepared.url = url  # as it is written
                with requests.Session() as session:
                    answer = session.send(prepared, timeout=30)
                assert answer.status_code in (401, 404), (method, path, headers)
    assert requests.get(f"{sglang_engine.url}/health", timeout=60).status_code == 200
    websocket = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    websocket["Sec-WebSocket-Key"] = "MDEyMzQ1Njc4OWFiY2RlZg=="
    url = f"{sglang_engine.url}/v1/realtime"
    assert requests.get(url, headers=websocket, timeout=30).status_code >= 400


def test_on_a_cpu_only_the_first_process_of_a_server_imports(shared_server: ServerOwner) -> None:
    """The others are its copies, share its memory, and show their own stacks all the same."""
    server = psutil.Process(shared_server.server_pid)
    children = {child.name(): child for child in server.children(recursive=True)}
    stacks = {name: dump_stacks(child.pid) for name, child in children.items()}
    assert set(stacks) == {"sglang::scheduler", "sglang::detokenizer"}
    assert "scheduler.py" in stacks["sglang::scheduler"]
    assert "detokenizer_manager.py" in stacks["sglang::detokenizer"]
    for child in children.values():
        assert child.cmdline()[0].startswith("sglang::")
        memory = child.memory_full_info()
        assert memory.rss - memory.uss > 200 << 20


def test_the_key_is_nowhere_but_in_its_file(
    sglang_engine: SGLangEngine, shared_server: ServerOwner
) -> None:
    key_file = sglang_engine.key_file
    assert key_file is not None and key_file.stat().st_mode & 0o777 == 0o600
    key = json.loads(key_file.read_text())["api-key"]
    assert len(key) == 64
    log = Path(sglang_engine.log).read_text()
    assert "'api_key': 'hidden'" in log and key not in log
    for path in ("/server_info", "/get_server_info"):
        told = sglang_engine._request("GET", path)
        assert told.json()["api_key"] == "hidden" and key not in told.text
        assert "--api-key hidden" in told.json()["launch_command"]
    server = psutil.Process(shared_server.server_pid)
    for process in (server, *server.children(recursive=True)):
        assert key not in " ".join(process.cmdline())
        assert key not in " ".join(process.environ().values())
    assert key not in repr(sglang_engine)


def test_the_engines_of_an_attempt_have_one_key(tiny_model: Path, tmp_path: Path) -> None:
    """Also one that starts again: others of the attempt know the key that is there."""
    (tmp_path / "other").mkdir()
    keys = []
    for log in ("first.log", "second.log", "first.log", "other/first.log"):
        server = made(tiny_model, tmp_path / log)
        server.command = ["sleep", "60"]
        with pytest.raises(RunError, match="was not up"):
            server.start(deadline_s=0.0)
        keys.append((tmp_path / log).with_name("engine_key.yaml").read_text())
    assert keys[0] == keys[1] == keys[2] != keys[3]


@pytest.mark.parametrize("name", ["api_key", "tokenizer_worker_num", "grpc_port", "enable_http2"])
def test_an_option_that_would_open_the_server_is_refused(name: str) -> None:
    rollout = RolloutConfig(sglang={name: 2})
    with pytest.raises(RunError, match=f"rollout.sglang.{name} is set by nanoslime; use nothing:"):
        SGLang().check_options(rollout)
