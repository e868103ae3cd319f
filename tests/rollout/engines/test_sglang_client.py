"""One real SGLang server, driven over HTTP: sampling, pause and flush, every way to
change its weights."""

import asyncio
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from nanoslime.process_groups import join_group, shared_store
from nanoslime.rollout.engines.embedded_model import EmbeddedEngine
from nanoslime.rollout.engines.sglang_client import SGLangEngine
from nanoslime.rollout.router import Router
from nanoslime.sealed_bucket import HEADER, Place, seal
from nanoslime.shared_bytes import SharedBytes
from nanoslime.types import (
    BroadcastEngine,
    Engine,
    GenerateRequest,
    Generation,
    PauseMode,
    RunError,
    Status,
    WeightGroup,
)
from nanoslime.weight_sync.colocated import payload_of
from nanoslime.weight_sync.plan import Bucket, FlatBucket, PlannedTensor
from tests.serving import (
    VOCAB_SIZE,
    ServerOwner,
    num_running,
    reference_logprobs,
    wait_until_running,
)

pytestmark = pytest.mark.sglang

PROMPT = [40, 41, 42, 43]
NORM = "model.norm.weight"
DEADLINE_S = 60


def generate(
    engine: SGLangEngine, *, temperature: float = 1.0, n: int = 2, tokens: int = 24
) -> list[Generation]:
    request = GenerateRequest(token_ids=PROMPT, n=n, max_new_tokens=tokens, temperature=temperature)
    return asyncio.run(engine.generate(request))


@contextmanager
def in_background(function: Callable[..., Any], *args: Any, **options: Any) -> Iterator[Future]:
    """Runs `function` in a thread; the block may ask the future for its result or its error."""
    with ThreadPoolExecutor(max_workers=1) as threads:
        yield threads.submit(function, *args, **options)


def assert_sampled_from(
    model: Path, generation: Generation, temperature: float = 1.0, first: int = 0
) -> None:
    """From token `first` on, the logprobs are the model's, and off by rounding at most."""
    reference = reference_logprobs(model, PROMPT, generation.token_ids, temperature)
    difference = reference - torch.tensor(generation.logprobs)
    assert difference[first:].abs().max() < 1e-4


def assert_serves(engine: SGLangEngine, model: Path, temperature: float = 1.0) -> None:
    for generation in generate(engine, temperature=temperature):
        assert_sampled_from(model, generation, temperature)


def test_is_a_broadcast_engine_and_can_be_pickled(sglang_engine: SGLangEngine) -> None:
    assert isinstance(sglang_engine, BroadcastEngine)
    assert pickle.loads(pickle.dumps(sglang_engine)).policy_version() == 0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_sampling_temperature(
    sglang_engine: SGLangEngine, tiny_model: Path, temperature: float
) -> None:
    assert_serves(sglang_engine, tiny_model, temperature)


def test_truncated_by_the_limit(sglang_engine: SGLangEngine) -> None:
    (truncated,) = generate(sglang_engine, n=1, tokens=5)
    assert truncated.status is Status.TRUNCATED
    assert len(truncated.token_ids) == 5
    assert truncated.versions == [(0, 0)]


def test_completed_by_a_stop_token(sglang_engine: SGLangEngine) -> None:
    every_token = tuple(range(VOCAB_SIZE))
    request = GenerateRequest(
        PROMPT, n=1, max_new_tokens=5, temperature=1.0, stop_token_ids=every_token
    )
    (stopped,) = asyncio.run(sglang_engine.generate(request))
    assert stopped.status is Status.COMPLETED
    assert len(stopped.token_ids) == 1
    assert len(stopped.logprobs) == 1


def test_a_text_ends_a_response_as_in_the_embedded_engine(
    sglang_engine: SGLangEngine, tiny_model: Path
) -> None:
    """Both take the likeliest tokens, so that both give the same ones."""
    embedded = EmbeddedEngine(str(tiny_model), "float32", "cpu", seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def likeliest(engine: Engine, *stop: str) -> Generation:
        request = GenerateRequest(
            PROMPT, n=1, max_new_tokens=24, temperature=1.0, top_k=1, stop=stop
        )
        (generation,) = asyncio.run(engine.generate(request))
        return generation

    whole = likeliest(embedded)
    for first in (2, 11):
        text = tokenizer.decode(whole.token_ids[first : first + 2])
        by_server = likeliest(sglang_engine, text, "never there")
        here = likeliest(embedded, text, "never there")
        assert by_server.token_ids == here.token_ids
        assert by_server.status is here.status is Status.COMPLETED
        assert len(by_server.logprobs) == len(by_server.token_ids) < 24


def test_a_token_outside_the_vocabulary_is_refused_before_it_is_sent(
    sglang_engine: SGLangEngine,
) -> None:
    request = GenerateRequest([5, VOCAB_SIZE], n=1, max_new_tokens=2, temperature=1.0)
    message = f"engine-0: token id {VOCAB_SIZE} at position 1 .* vocabulary of {VOCAB_SIZE}"
    with pytest.raises(RunError, match=message):
        asyncio.run(sglang_engine.generate(request))


def test_an_over_long_prompt_is_an_error_of_its_samples_only(sglang_engine: SGLangEngine) -> None:
    request = GenerateRequest([5] * 5000, n=2, max_new_tokens=2, temperature=1.0)
    first, second = asyncio.run(sglang_engine.generate(request))
    assert first.status is Status.ERROR
    assert second.status is Status.ERROR
    assert "5000 tokens" in str(first.error)
    assert generate(sglang_engine)[0].status is not Status.ERROR


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [("top_k", 0, "top_k must be"), ("max_new_tokens", 4096, "maximum"), ("top_p", 7.0, "top_p")],
)
def test_what_sglang_refuses_is_an_error_in_its_own_words(
    sglang_engine: SGLangEngine, field: str, value: float, says: str
) -> None:
    request = GenerateRequest(PROMPT, n=2, max_new_tokens=2, temperature=1.0)
    refused = replace(request, **{field: value})
    answers = asyncio.run(Router([sglang_engine]).generate(refused))
    assert [answer.status for answer in answers] == [Status.ERROR] * 2
    assert answers[0].error.startswith("SGLang refused it (400): ")
    assert says in answers[0].error


def test_proxies_of_the_environment_are_ignored(
    sglang_engine: SGLangEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert sglang_engine.policy_version() == 0
    assert generate(sglang_engine, tokens=2)[0].token_ids


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_paused_requests_go_on_under_the_new_version(
    sglang_engine: SGLangEngine, other_model: Path, mode: PauseMode
) -> None:
    """A request that outlives a weight update reports which tokens each version
    sampled, with its logprobs. In place it keeps the cache of the old weights, which cannot be
    flushed.
    """
    with in_background(generate, sglang_engine, n=1, tokens=1500) as running:
        wait_until_running(sglang_engine)
        sglang_engine.pause(mode)
        is_kept = mode == "in_place"
        if not is_kept:
            sglang_engine.flush()
        sglang_engine.begin_update()
        send_tensors(sglang_engine, load_file(other_model / "model.safetensors"), Place(1, 0, 1))
        sglang_engine.end_update(1, flush=not is_kept)
        sglang_engine.update_weights_from_disk(str(other_model), 1, flush=not is_kept)
        assert sglang_engine.policy_version() == 1
        assert not running.done()
        sglang_engine.resume()
        (answer,) = running.result(DEADLINE_S)
    old, new = answer.versions
    assert old == (0, 0)
    first_of_new, version = new
    assert version == 1
    if not is_kept:
        assert_sampled_from(other_model, answer, first=first_of_new)


@pytest.mark.parametrize("ends", ["interrupt", "interrupt_while_paused", "pause"])
def test_interrupted_requests_end_with_the_tokens_that_they_have(
    sglang_engine: SGLangEngine, tiny_model: Path, ends: str
) -> None:
    with in_background(generate, sglang_engine, n=2, tokens=1500) as running:
        wait_until_running(sglang_engine)
        if ends == "pause":
            sglang_engine.pause("abort")
        elif ends == "interrupt_while_paused":
            sglang_engine.pause("retract")
            sglang_engine.interrupt()
        else:
            sglang_engine.interrupt()
        answers = running.result(DEADLINE_S)
    sglang_engine.resume()
    for answer in answers:
        assert answer.status is Status.ABORTED
        assert len(answer.token_ids) == len(answer.logprobs) < 1500
        if answer.token_ids:
            assert answer.versions == [(0, 0)]
            assert_sampled_from(tiny_model, answer)
    assert generate(sglang_engine, tokens=2)[0].status is Status.TRUNCATED


def test_requests_of_one_event_loop_share_a_session_and_its_connections(
    sglang_engine: SGLangEngine,
) -> None:
    """The session closes with its loop; a copy of the engine has its own."""
    request = GenerateRequest(PROMPT, n=1, max_new_tokens=1, temperature=1.0)

    async def many() -> list[Any]:
        await asyncio.gather(*(sglang_engine.generate(request) for _ in range(3)))
        session = await sglang_engine._sessions.here()
        await pickle.loads(pickle.dumps(sglang_engine)).generate(request)
        assert session is await sglang_engine._sessions.here()
        return [session, len(session.connector._conns)]

    first, num_hosts = asyncio.run(many())
    assert first.closed and num_hosts == 1
    second, _ = asyncio.run(many())
    assert second is not first


def test_a_prompt_is_scored_under_the_weights_of_now_whatever_the_cache_has(
    sglang_engine: SGLangEngine, tiny_model: Path, other_model: Path
) -> None:
    prompt = list(range(40, 104))
    for version, model in ((3, tiny_model), (4, other_model)):
        sglang_engine.update_weights_from_disk(str(model), version, flush=False)
        expected = reference_logprobs(model, prompt[:1], prompt[1:], 1.0)
        for _ in range(2):
            logprobs, label = sglang_engine.score(prompt)
            assert label == version
            assert (torch.tensor(logprobs) - expected).abs().max() < 1e-4


KINDS_THAT_DIFFER = {
    "float16": (
        lambda kind: (kind[0], "torch.float16", kind[2]),
        "is sent as torch.float16, and the engine was loaded as torch.float32",
    ),
    "name": (lambda kind: ("model.nom.weight", *kind[1:]), "unknown tensor 'model.nom.weight'"),
    "shape": (lambda kind: (*kind[:2], (65,)), r"'model.norm.weight' has shape \[65\], .* \[64\]"),
    "nothing": (lambda kind: None, "1 of 25 tensors missing: model.norm.weight"),
}


@pytest.mark.parametrize("difference", KINDS_THAT_DIFFER)
def test_an_engine_agrees_to_no_other_tensors_than_its_own(
    sglang_engine: SGLangEngine, tiny_model: Path, difference: str
) -> None:
    """The embedded engine neither. SGLang's own check of weights goes on as ever."""
    kinds = [
        (name, "torch.float32", tuple(tensor.shape))
        for name, tensor in load_file(tiny_model / "model.safetensors").items()
    ]
    change, message = KINDS_THAT_DIFFER[difference]
    changed = [change(kind) if kind[0] == NORM else kind for kind in kinds]
    for engine in (sglang_engine, EmbeddedEngine(str(tiny_model), "float32", "cpu", seed=0)):
        engine.agree(kinds)
        with pytest.raises(RunError, match=f"engine {engine.name} .*{message}"):
            engine.agree([kind for kind in changed if kind is not None])
    assert len(sglang_engine._post("/weights_checker", action="checksum")["ranks"]) == 1


def test_an_abandoned_update_can_be_followed_by_another(
    sglang_engine: SGLangEngine, tiny_model: Path, other_model: Path
) -> None:
    sglang_engine.abandon_update("no such group")
    sglang_engine.pause()
    sglang_engine.begin_update()
    sglang_engine.abandon_update("no such group")
    sglang_engine.begin_update()
    send_tensors(sglang_engine, load_file(other_model / "model.safetensors"), Place(5, 0, 1))
    sglang_engine.end_update(5)
    sglang_engine.resume()
    assert sglang_engine.policy_version() == 5
    assert_serves(sglang_engine, other_model)


def test_flush_names_the_engine_when_requests_do_not_end(sglang_engine: SGLangEngine) -> None:
    impatient = replace(sglang_engine, control_deadline_s=1.0)
    with in_background(generate, sglang_engine, n=1, tokens=400):
        wait_until_running(sglang_engine)
        sglang_engine.pause("in_place")
        try:
            with pytest.raises(RunError, match="engine-0 at .* cache not flushed in 1 s"):
                impatient.flush()
        finally:
            sglang_engine.resume()


def checksums(engine: SGLangEngine) -> dict[str, str]:
    """SGLang's checksum of each parameter of tensor-parallel rank 0, under its fused names
    (qkv_proj)."""
    answer = engine._post("/weights_checker", action="checksum")
    return answer["ranks"][0]["checksums"]


def test_disk_update(sglang_engine: SGLangEngine, tiny_model: Path, other_model: Path) -> None:
    before = checksums(sglang_engine)
    sglang_engine.update_weights_from_disk(str(other_model), 7)
    assert sglang_engine.policy_version() == 7
    assert_serves(sglang_engine, other_model)
    assert checksums(sglang_engine) != before
    sglang_engine.update_weights_from_disk(str(tiny_model), 8)
    assert checksums(sglang_engine) == before


def add_an_unknown_tensor(file: Path) -> None:
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.qkv_proj.weight"] = torch.zeros(2)
    save_file(tensors, file)


def remove_a_tensor(file: Path) -> None:
    tensors = load_file(file)
    del tensors[NORM]
    save_file(tensors, file)


def change_a_shape(file: Path) -> None:
    tensors = load_file(file)
    tensors[NORM] = torch.zeros(3)
    save_file(tensors, file)


def cut_the_end(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-64])


def remove_the_directory(file: Path) -> None:
    shutil.rmtree(file.parent)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (add_an_unknown_tensor, "qkv_proj"),
        (remove_a_tensor, r"1 of 25 tensors missing: model\.norm"),
        (change_a_shape, r"\[3\].*\[64\]"),
        (cut_the_end, "weights"),
        (remove_the_directory, "weights"),
    ],
)
def test_a_bad_directory_is_refused_and_changes_nothing(
    sglang_engine: SGLangEngine,
    tiny_model: Path,
    other_model: Path,
    tmp_path: Path,
    fault: Callable[[Path], None],
    message: str,
) -> None:
    path = tmp_path / "weights"
    shutil.copytree(other_model, path)
    fault(path / "model.safetensors")
    refusal = f"engine-0 .*update_weights_from_disk refused .*{message}"
    with pytest.raises(RunError, match=refusal):
        sglang_engine.update_weights_from_disk(str(path), 1)
    assert sglang_engine.policy_version() == 0
    assert_serves(sglang_engine, tiny_model)


def flat_of(tensors: dict[str, Tensor], place: Place) -> tuple[FlatBucket, Tensor]:
    """A bucket as a trainer sends it."""
    planned = [PlannedTensor(n, tuple(t.shape), t.dtype, (), ()) for n, t in tensors.items()]
    bucket = FlatBucket(Bucket(tuple(planned)))
    flat = torch.empty(bucket.nbytes, dtype=torch.uint8)
    for view, tensor in zip(bucket.views(flat), tensors.values(), strict=True):
        view.copy_(tensor)
    seal(flat, place, bucket.parts)
    return bucket, flat


class Sender:
    """A trainer's rank 0: it joins the group, and broadcasts each bucket to the engine."""

    def __init__(self, engine: SGLangEngine, name: str) -> None:
        self.engine = engine
        self.name = name
        store = shared_store("127.0.0.1", timeout_s=DEADLINE_S)
        group = WeightGroup(name, "127.0.0.1", store.port, world_size=2, backend="gloo")
        joining = in_background(engine.join_weight_group, group, first_rank=1)
        with joining as joined:
            self.group = join_group(store, group, rank=0, timeout_s=DEADLINE_S)
            joined.result(DEADLINE_S)

    def send(self, tensors: dict[str, Tensor], place: Place, *, flips: int | None = None) -> None:
        """Sends a bucket, of which a bit of byte `flips` changes on the way.

        Raises RunError where the engine refuses it.
        """
        bucket, flat = flat_of(tensors, place)
        if flips is not None:
            flat[flips] ^= 1
        self.send_run((bucket, flat))

    def send_run(self, *run: tuple[FlatBucket, Tensor]) -> None:
        """Sends buckets that are announced in one call."""
        buckets = [bucket for bucket, _ in run]
        dtypes = [dtype for bucket in buckets for dtype in bucket.dtypes]
        receiving = in_background(
            self.engine.receive_buckets,
            names=[name for bucket in buckets for name in bucket.names],
            dtypes=[str(dtype).removeprefix("torch.") for dtype in dtypes],
            shapes=[list(shape) for bucket in buckets for shape in bucket.shapes],
            group=self.name,
        )
        with receiving as received:
            for _, flat in run:
                self.group.broadcast([flat]).wait()
            received.result(DEADLINE_S)

    def close(self) -> None:
        self.engine.abandon_update(self.name)


def test_distributed_update_in_buckets(sglang_engine: SGLangEngine, other_model: Path) -> None:
    tensors = sorted(load_file(other_model / "model.safetensors").items())
    sender = Sender(sglang_engine, "weights")
    sglang_engine.pause()
    sglang_engine.begin_update()
    sender.send(dict(tensors[:10]), Place(5, 0, 2))
    sender.send(dict(tensors[10:]), Place(5, 1, 2))
    sglang_engine.end_update(5)
    sglang_engine.resume()
    sender.close()
    assert sglang_engine.policy_version() == 5
    assert_serves(sglang_engine, other_model)
    assert generate(sglang_engine, tokens=2)[0].versions == [(0, 5)]


def send_a_part(engine: SGLangEngine, tensors: dict[str, Tensor]) -> None:
    """And the trainer is gone; who cleans up after it ends the update."""
    engine.begin_update()
    send_tensors(engine, dict(sorted(tensors.items())[:10]), Place(5, 0, 2))
    engine.abandon_update("no group")


def reset_by_a_check(engine: SGLangEngine, tensors: dict[str, Tensor]) -> None:
    for action in ("snapshot", "reset_tensors"):
        engine._post("/weights_checker", action=action)


@pytest.mark.parametrize("is_mixed", [False, True])
def test_an_engine_that_stands_still_leaves_its_core_to_others(
    shared_server: ServerOwner, sglang_engine: SGLangEngine, is_mixed: bool
) -> None:
    """SGLang's own loop asks for requests without a rest: several paused engines of a node would
    keep its trainers, and each other's part of a weight sync, waiting."""
    server = psutil.Process(shared_server.server_pid)
    processes = [server, *server.children(recursive=True)]

    def processor_s() -> float:
        times = [process.cpu_times() for process in processes]
        return sum(of_process.user + of_process.system for of_process in times)

    sglang_engine.pause()
    if is_mixed:
        reset_by_a_check(sglang_engine, {})
        sglang_engine.resume()
    begin_s = processor_s()
    time.sleep(1.5)
    assert processor_s() - begin_s < 0.5


@pytest.mark.parametrize(("mix", "is_paused"), [(send_a_part, True), (reset_by_a_check, False)])
def test_an_engine_without_whole_weights_generates_nothing_whoever_resumes_it(
    sglang_engine: SGLangEngine, other_model: Path, mix: Callable[..., None], is_paused: bool
) -> None:
    if is_paused:
        sglang_engine.pause()
    mix(sglang_engine, load_file(other_model / "model.safetensors"))
    sglang_engine.resume()
    with pytest.raises(RunError, match="/generate was not answered within"):
        replace(sglang_engine, control_deadline_s=0.7).score(PROMPT)
    with pytest.raises(RunError, match="refused: weights that come by this way are not checked"):
        sglang_engine._post("/update_weights_from_ipc", zmq_handles={})
    sglang_engine.pause()
    sglang_engine.update_weights_from_disk(str(other_model), 5)
    with pytest.raises(RunError, match="/generate was not answered within"):
        replace(sglang_engine, control_deadline_s=0.7).score(PROMPT)
    sglang_engine.resume()
    assert_serves(sglang_engine, other_model)


def test_buckets_of_one_call_are_all_received_and_none_is_loaded_after_a_refused_one(
    sglang_engine: SGLangEngine, other_model: Path
) -> None:
    tensors = sorted(load_file(other_model / "model.safetensors").items())
    parts = [dict(tensors[:5]), dict(tensors[5:12]), dict(tensors[12:])]
    run = [flat_of(part, Place(5, number, 3)) for number, part in enumerate(parts)]
    sender = Sender(sglang_engine, "runs")
    sglang_engine.begin_update()
    _, broken = run[1]
    broken[500] ^= 1
    with pytest.raises(RunError, match="bucket 1 of version 5 has not the bytes that were sent"):
        sender.send_run(*run)
    broken[500] ^= 1
    sender.send_run(*run[1:])
    sglang_engine.end_update(5)
    sender.close()
    assert_serves(sglang_engine, other_model)


def test_a_bucket_that_is_not_what_was_sent_is_refused_and_the_weights_stay(
    sglang_engine: SGLangEngine, tiny_model: Path, other_model: Path
) -> None:
    """Each is an update of its own: nothing of it is loaded."""
    tensors = load_file(other_model / "model.safetensors")
    half = dict(sorted(tensors.items())[:10])
    rest = dict(sorted(tensors.items())[10:])
    sender = Sender(sglang_engine, "seals")
    sglang_engine.begin_update()
    with pytest.raises(RunError, match="bucket 0 of version 5 has not the bytes that were sent"):
        sender.send(tensors, Place(5, 0, 1), flips=1000)
    with pytest.raises(RunError, match="bucket 1 of version 5 came where 0 was next"):
        sender.send(half, Place(5, 1, 2))
    assert_serves(sglang_engine, tiny_model)

    sender.send(half, Place(5, 0, 3))
    with pytest.raises(RunError, match="bucket 2 of version 5 came where 1 was next"):
        sender.send(rest, Place(5, 2, 3))
    with pytest.raises(RunError, match="a bucket of another update, Place.version=4"):
        sender.send(rest, Place(4, 1, 3))
    sender.send(rest, Place(5, 1, 3))
    with pytest.raises(RunError, match="2 of 3 buckets came"):
        sglang_engine.end_update(5)

    sglang_engine.begin_update()
    sender.send(tensors, Place(4, 0, 1))
    with pytest.raises(RunError, match="holds the weights of version 4, and should hold version 5"):
        sglang_engine.end_update(5)
    assert sglang_engine.policy_version() == 0

    sglang_engine.begin_update()
    sender.send(tensors, Place(5, 0, 1))
    sglang_engine.end_update(5)
    sender.close()
    assert_serves(sglang_engine, other_model)


def test_an_engine_that_holds_other_weights_than_it_is_compared_with_says_which(
    sglang_engine: SGLangEngine, tiny_model: Path, other_model: Path
) -> None:
    """Nothing is loaded twice unless it differs: a norm with one other bit is found by name."""
    tensors = load_file(other_model / "model.safetensors")
    for _ in range(2):
        sglang_engine.begin_update()
        send_tensors(sglang_engine, tensors, Place(5, 0, 1))
        sglang_engine.end_update(5)
    sglang_engine.begin_update()
    send_tensors(sglang_engine, tensors, Place(5, 0, 1, compares=True))
    sglang_engine.end_update(5)

    changed = dict(tensors)
    changed[NORM] = tensors[NORM].clone()
    changed[NORM].view(torch.int32)[7] ^= 1
    sglang_engine.begin_update()
    send_tensors(sglang_engine, changed, Place(5, 0, 1, compares=True))
    refusal = "1 parameters of the engine were not what the trainer has: model.norm.weight"
    with pytest.raises(RunError, match=refusal):
        sglang_engine.end_update(5)

    sglang_engine.update_weights_from_disk(str(tiny_model), 6)
    sglang_engine.update_weights_from_disk(str(tiny_model), 6, compares=True)
    with pytest.raises(RunError, match="25 parameters|parameters of the engine were not"):
        sglang_engine.update_weights_from_disk(str(other_model), 6, compares=True)
    sglang_engine.update_weights_from_disk(str(tiny_model), 7)
    assert_serves(sglang_engine, tiny_model)


def send_tensors(engine: SGLangEngine, tensors: dict[str, Tensor], place: Place) -> None:
    bucket, flat = flat_of(tensors, place)
    with shared(bucket, flat) as payload:
        engine.receive_payloads([payload])


@contextmanager
def shared(bucket: FlatBucket, flat: Tensor) -> Iterator[bytes]:
    """A bucket as a trainer hands it to one rank of an engine."""
    memory = SharedBytes(flat.numel())
    memory.tensor.copy_(flat)
    yield payload_of(bucket, memory.handle(flat.numel()))


# What others than our trainers may send, as stock SGLang takes it.
WITHOUT_HEADER: list[Any] = [
    [],
    {"flattened_tensor": torch.zeros(2, device="meta"), "metadata": []},
    [(NORM, None)],
    [(NORM, torch.zeros(64, device="meta"))],
    [(HEADER, torch.zeros(1, device="meta"))],
]


def test_tensor_update_refuses_wrong_names_and_goes_on(
    sglang_engine: SGLangEngine, tiny_model: Path, other_model: Path
) -> None:
    tensors = load_file(other_model / "model.safetensors")
    norm = tensors.pop(NORM)
    sglang_engine.begin_update()
    with pytest.raises(RunError, match="unknown tensor 'model.norm.wait'"):
        send_tensors(sglang_engine, {"model.norm.wait": norm}, Place(3, 0, 1))
    for content in WITHOUT_HEADER:
        with pytest.raises(RunError, match=r"refused: .* header; log"):
            sglang_engine.receive_payloads([pickle.dumps(content)])
    assert_serves(sglang_engine, tiny_model)
    bucket, flat = flat_of(tensors, Place(3, 0, 1))
    with shared(bucket, flat) as payload:
        pass
    with pytest.raises(RunError, match="refused: memory of a trainer rank cannot be opened as"):
        sglang_engine.receive_payloads([payload])
    send_tensors(sglang_engine, tensors, Place(3, 0, 1))
    with pytest.raises(RunError, match=f"1 of 25 tensors missing: {NORM}"):
        sglang_engine.end_update(3)

    sglang_engine.begin_update()
    send_tensors(sglang_engine, {**tensors, NORM: norm}, Place(3, 0, 1))
    sglang_engine.end_update(3)
    assert sglang_engine.policy_version() == 3
    assert_serves(sglang_engine, other_model)


def test_memory_is_released_only_once_no_request_runs(
    sglang_engine: SGLangEngine, tiny_model: Path
) -> None:
    with in_background(generate, sglang_engine, n=2, tokens=200) as running:
        wait_until_running(sglang_engine)
        sglang_engine.release_memory()
        assert num_running(sglang_engine) == 0
        answers = running.result(DEADLINE_S)
    assert [len(answer.token_ids) for answer in answers] == [200, 200]
    sglang_engine.resume_memory("weights")
    sglang_engine.resume_memory("cache")
    assert_serves(sglang_engine, tiny_model)


def test_distributed_update_refuses_wrong_names_and_goes_on(
    sglang_engine: SGLangEngine, tiny_model: Path, other_model: Path
) -> None:
    tensors = load_file(other_model / "model.safetensors")
    norm = tensors.pop(NORM)
    sender = Sender(sglang_engine, "refusals")
    with pytest.raises(RunError, match="must run between"):
        sender.engine.receive_buckets(names=[], dtypes=[], shapes=[], group="refusals")

    sglang_engine.begin_update()
    with pytest.raises(RunError, match="unknown tensor 'model.norm.wait'"):
        sender.send({"model.norm.wait": norm}, Place(3, 0, 2))
    wrong_shape = rf"'{NORM}' has shape \[2\], the engine's checkpoint \[64\]"
    with pytest.raises(RunError, match=wrong_shape):
        sender.send({NORM: torch.zeros(2)}, Place(3, 0, 2))
    assert_serves(sglang_engine, tiny_model)
    sender.send(tensors, Place(3, 0, 2))
    with pytest.raises(RunError, match="came twice"):
        sender.send({"lm_head.weight": tensors["lm_head.weight"]}, Place(3, 1, 2))
    with pytest.raises(RunError, match=f"1 of 25 tensors missing: {NORM}"):
        sglang_engine.end_update(3)
    assert sglang_engine.policy_version() == 0

    head = tensors.pop("lm_head.weight")
    sglang_engine.begin_update()
    sender.send({"lm_head.weight...": head[:100]}, Place(3, 0, 3))
    sender.send({**tensors, NORM: norm}, Place(3, 1, 3))
    with pytest.raises(RunError, match="'lm_head.weight' has shape"):
        sender.send({"lm_head.weight": head[101:]}, Place(3, 2, 3))
    with pytest.raises(RunError, match="1 of 25 tensors missing: lm_head.weight"):
        sglang_engine.end_update(3)

    sglang_engine.begin_update()
    sender.send({"lm_head.weight...": head[:100]}, Place(3, 0, 2))
    sender.send({**tensors, NORM: norm, "lm_head.weight": head[100:]}, Place(3, 1, 2))
    sglang_engine.end_update(3)
    sender.close()
    assert_serves(sglang_engine, other_model)
