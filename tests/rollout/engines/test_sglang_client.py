"""One real SGLang server, driven over HTTP: sampling, pause and flush, every way of changing its weights."""

import asyncio
import pickle
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

from nanoslime.process_groups import join_group, listen
from nanoslime.rollout.engines.sglang_client import SGLangEngine
from nanoslime.types import BroadcastEngine, GenerateRequest, Generation, RunError, Status
from tests.serving import VOCAB_SIZE, reference_logprobs

pytestmark = pytest.mark.sglang

PROMPT = [40, 41, 42, 43]


def generate(
    engine: SGLangEngine, *, temperature: float = 1.0, n: int = 2, tokens: int = 24
) -> list[Generation]:
    request = GenerateRequest(token_ids=PROMPT, n=n, max_new_tokens=tokens, temperature=temperature)
    return asyncio.run(engine.generate(request))


def assert_serves(engine: SGLangEngine, model: Path, temperature: float = 1.0) -> None:
    """The engine's logprobs are those of the checkpoint `model`, and not off by more than rounding."""
    for generation in generate(engine, temperature=temperature):
        reference = reference_logprobs(model, PROMPT, generation.token_ids, temperature)
        assert (reference - torch.tensor(generation.logprobs)).abs().max() < 1e-4


def test_is_a_broadcast_engine_and_can_be_pickled(sglang_engine: SGLangEngine) -> None:
    assert isinstance(sglang_engine, BroadcastEngine)
    assert pickle.loads(pickle.dumps(sglang_engine)).policy_version() == 0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_sampling_temperature(
    sglang_engine: SGLangEngine, tiny_model: Path, temperature: float
) -> None:
    assert_serves(sglang_engine, tiny_model, temperature)


def test_truncated_or_stopped(sglang_engine: SGLangEngine) -> None:
    (truncated,) = generate(sglang_engine, n=1, tokens=5)
    assert (truncated.status, len(truncated.token_ids), truncated.versions) == (
        Status.TRUNCATED,
        5,
        [(0, 0)],
    )
    every_token = tuple(range(VOCAB_SIZE))
    request = GenerateRequest(
        PROMPT, n=1, max_new_tokens=5, temperature=1.0, stop_token_ids=every_token
    )
    (stopped,) = asyncio.run(sglang_engine.generate(request))
    assert (stopped.status, len(stopped.token_ids), len(stopped.logprobs)) == (
        Status.COMPLETED,
        1,
        1,
    )


def test_a_token_outside_the_vocabulary_is_refused_before_it_is_sent(
    sglang_engine: SGLangEngine,
) -> None:
    request = GenerateRequest([5, VOCAB_SIZE], n=1, max_new_tokens=2, temperature=1.0)
    with pytest.raises(
        RunError,
        match=f"engine-0: token id {VOCAB_SIZE} at position 1 .* vocabulary of {VOCAB_SIZE}",
    ):
        asyncio.run(sglang_engine.generate(request))


def test_an_over_long_prompt_is_an_error_of_its_samples_only(sglang_engine: SGLangEngine) -> None:
    request = GenerateRequest([5] * 5000, n=2, max_new_tokens=2, temperature=1.0)
    first, second = asyncio.run(sglang_engine.generate(request))
    assert first.status is second.status is Status.ERROR
    assert "5000 tokens" in str(first.error)
    assert generate(sglang_engine)[0].status is not Status.ERROR


def test_proxies_of_the_environment_are_ignored(
    sglang_engine: SGLangEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert sglang_engine.policy_version() == 0
    assert generate(sglang_engine, tokens=2)[0].token_ids


def test_paused_requests_go_on_under_the_new_version(
    sglang_engine: SGLangEngine, other_model: Path
) -> None:
    """A request that outlives a weight update reports which tokens each version sampled, with its
    logprobs."""
    answers: list[Generation] = []
    request = GenerateRequest(PROMPT, n=1, max_new_tokens=1500, temperature=1.0)
    thread = threading.Thread(
        target=lambda: answers.extend(asyncio.run(sglang_engine.generate(request)))
    )
    thread.start()
    time.sleep(0.5)
    sglang_engine.pause()
    sglang_engine.flush()
    sglang_engine.update_weights_from_disk(str(other_model), 1)
    assert sglang_engine.policy_version() == 1
    assert thread.is_alive()
    sglang_engine.resume()
    thread.join(60)
    (first, version), (second, new_version) = answers[0].versions
    assert (first, version, new_version) == (0, 0, 1)
    reference = reference_logprobs(other_model, PROMPT, answers[0].token_ids, 1.0)[second:]
    assert (reference - torch.tensor(answers[0].logprobs)[second:]).abs().max() < 1e-4


def test_flush_names_the_engine_when_requests_do_not_end(sglang_engine: SGLangEngine) -> None:
    impatient = SGLangEngine(
        name="engine-0",
        url=sglang_engine.url,
        log=sglang_engine.log,
        vocab_size=VOCAB_SIZE,
        control_deadline_s=1.0,
    )
    request = GenerateRequest(PROMPT, n=1, max_new_tokens=400, temperature=1.0)
    thread = threading.Thread(target=lambda: asyncio.run(sglang_engine.generate(request)))
    thread.start()
    time.sleep(0.3)
    sglang_engine.pause("in_place")
    try:
        with pytest.raises(RunError, match="engine-0 at .* cache not flushed in 1 s"):
            impatient.flush()
    finally:
        sglang_engine.resume()
        thread.join(60)


def checksums(engine: SGLangEngine) -> dict[str, str]:
    """SGLang's checksum of each parameter of tensor-parallel rank 0, under its fused names (qkv_proj)."""
    return engine._post("/weights_checker", action="checksum")["ranks"][0]["checksums"]


def test_disk_update(sglang_engine: SGLangEngine, tiny_model: Path, other_model: Path) -> None:
    before = checksums(sglang_engine)
    sglang_engine.update_weights_from_disk(str(other_model), 7)
    assert sglang_engine.policy_version() == 7
    assert_serves(sglang_engine, other_model)
    assert checksums(sglang_engine) != before
    sglang_engine.update_weights_from_disk(str(tiny_model), 8)
    assert checksums(sglang_engine) == before


@pytest.mark.parametrize("fault", ["unknown", "missing", "shape", "truncated", "absent"])
def test_a_bad_directory_is_refused_and_changes_nothing(
    sglang_engine: SGLangEngine, tiny_model: Path, other_model: Path, tmp_path: Path, fault: str
) -> None:
    path = tmp_path / "weights"
    shutil.copytree(other_model, path)
    file = path / "model.safetensors"
    tensors = load_file(file)
    if fault == "unknown":
        tensors["model.layers.0.self_attn.qkv_proj.weight"] = torch.zeros(2)
    elif fault == "missing":
        del tensors["model.norm.weight"]
    elif fault == "shape":
        tensors["model.norm.weight"] = torch.zeros(3)
    save_file(tensors, file)
    if fault == "truncated":
        file.write_bytes(file.read_bytes()[:-64])
    elif fault == "absent":
        shutil.rmtree(path)
    names = {
        "unknown": "qkv_proj",
        "missing": r"1 of 25 tensors missing: model\.norm",
        "shape": r"\[3\].*\[64\]",
    }
    with pytest.raises(
        RunError,
        match=f"engine-0 .*update_weights_from_disk refused .*{names.get(fault, 'weights')}",
    ):
        sglang_engine.update_weights_from_disk(str(path), 1)
    assert sglang_engine.policy_version() == 0
    assert_serves(sglang_engine, tiny_model)


class Sender:
    """What a trainer's rank 0 does: joins the group, and broadcasts each bucket while the engine receives
    it."""

    def __init__(self, engine: SGLangEngine, name: str) -> None:
        self.engine, self.name = engine, name
        store, where = listen("127.0.0.1", timeout_s=60), {"world_size": 2, "backend": "gloo"}
        at = {"address": "127.0.0.1", "port": store.port}
        joining = threading.Thread(
            target=engine.init_weight_group, kwargs={**at, **where, "rank_offset": 1, "group": name}
        )
        joining.start()
        self.group = join_group(store, **where, rank=0, name=name, timeout_s=60)
        joining.join(60)

    def send(self, tensors: dict[str, torch.Tensor]) -> None:
        errors: list[RunError] = []

        def receive() -> None:
            try:
                self.engine.receive_bucket(
                    names=list(tensors),
                    dtypes=[str(t.dtype).removeprefix("torch.") for t in tensors.values()],
                    shapes=[list(t.shape) for t in tensors.values()],
                    group=self.name,
                )
            except RunError as e:
                errors.append(e)

        receiving = threading.Thread(target=receive)
        receiving.start()
        for tensor in tensors.values():
            self.group.broadcast([tensor]).wait()
        receiving.join(60)
        if errors:
            raise errors[0]

    def close(self) -> None:
        self.engine.destroy_weight_group(self.name)


def test_distributed_update_in_buckets(sglang_engine: SGLangEngine, other_model: Path) -> None:
    tensors = sorted(load_file(other_model / "model.safetensors").items())
    sender = Sender(sglang_engine, "weights")
    sglang_engine.pause()
    sglang_engine.begin_update()
    sender.send(dict(tensors[:10]))
    sender.send(dict(tensors[10:]))
    sglang_engine.end_update(5)
    sglang_engine.resume()
    sender.close()
    assert sglang_engine.policy_version() == 5
    assert_serves(sglang_engine, other_model)
    assert generate(sglang_engine, tokens=2)[0].versions == [(0, 5)]


def send_tensors(engine: SGLangEngine, tensors: dict[str, torch.Tensor]) -> None:
    bucket = FlattenedTensorBucket(named_tensors=list(tensors.items()))
    content = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
    engine.receive_payloads([pickle.dumps(content)])


def test_tensor_update_refuses_wrong_names_and_goes_on(
    sglang_engine: SGLangEngine, tiny_model: Path, other_model: Path
) -> None:
    tensors = load_file(other_model / "model.safetensors")
    norm = {"model.norm.weight": tensors.pop("model.norm.weight")}
    sglang_engine.begin_update()
    with pytest.raises(RunError, match="unknown tensor 'model.norm.wait'"):
        send_tensors(sglang_engine, {"model.norm.wait": norm["model.norm.weight"]})
    assert_serves(sglang_engine, tiny_model)
    send_tensors(sglang_engine, tensors)
    with pytest.raises(RunError, match="1 of 25 tensors missing: model.norm.weight"):
        sglang_engine.end_update(3)
    sglang_engine.begin_update()
    send_tensors(sglang_engine, tensors | norm)
    sglang_engine.end_update(3)
    assert sglang_engine.policy_version() == 3
    assert_serves(sglang_engine, other_model)


def test_memory_is_released_only_once_no_request_runs(
    sglang_engine: SGLangEngine, tiny_model: Path
) -> None:
    request = GenerateRequest(PROMPT, n=2, max_new_tokens=200, temperature=1.0)
    answers: list[Generation] = []
    thread = threading.Thread(
        target=lambda: answers.extend(asyncio.run(sglang_engine.generate(request)))
    )
    thread.start()
    time.sleep(0.3)
    sglang_engine.release_memory()
    thread.join(60)
    assert [len(answer.token_ids) for answer in answers] == [200, 200]
    sglang_engine.resume_memory("weights")
    sglang_engine.resume_memory("cache")
    assert_serves(sglang_engine, tiny_model)


def test_distributed_update_refuses_wrong_names_and_goes_on(
    sglang_engine: SGLangEngine, tiny_model: Path, other_model: Path
) -> None:
    tensors = load_file(other_model / "model.safetensors")
    norm = {"model.norm.weight": tensors.pop("model.norm.weight")}
    sender = Sender(sglang_engine, "refusals")
    with pytest.raises(RunError, match="must run between"):
        sender.engine.receive_bucket(names=[], dtypes=[], shapes=[], group="refusals")
    sglang_engine.begin_update()
    with pytest.raises(RunError, match="unknown tensor 'model.norm.wait'"):
        sender.send({"model.norm.wait": norm["model.norm.weight"]})
    with pytest.raises(
        RunError, match=r"'model.norm.weight' has shape \[2\], the engine's checkpoint \[64\]"
    ):
        sender.send({"model.norm.weight": torch.zeros(2)})
    assert_serves(sglang_engine, tiny_model)
    sender.send(tensors)
    with pytest.raises(RunError, match="came twice"):
        sender.send({"lm_head.weight": tensors["lm_head.weight"]})
    with pytest.raises(RunError, match="1 of 25 tensors missing: model.norm.weight"):
        sglang_engine.end_update(3)
    assert sglang_engine.policy_version() == 0
    sglang_engine.begin_update()
    sender.send(tensors | norm)
    sglang_engine.end_update(3)
    sender.close()
    assert_serves(sglang_engine, other_model)
