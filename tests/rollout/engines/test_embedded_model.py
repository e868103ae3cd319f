"""The embedded engine against plain transformers: logprobs, batching, filters, weights,
experts."""

import asyncio
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from nanoslime.rollout.engines import embedded_model
from nanoslime.rollout.engines.embedded_model import EmbeddedEngine
from nanoslime.rollout.engines.embedded_sampling import pick
from nanoslime.types import Engine, GenerateRequest, Generation, PauseMode, RunError, Status
from tests.models.hf import add_mtp, save_model
from tests.serving import (
    VOCAB_SIZE,
    reference_logprobs,
    save_tied_with_head,
    save_tiny_model,
)


@pytest.fixture
def engine(tiny_model: Path) -> EmbeddedEngine:
    return make_engine(tiny_model)


def make_engine(path: Path, seed: int = 0) -> EmbeddedEngine:
    return EmbeddedEngine(model_path=str(path), dtype="float32", device="cpu", seed=seed)


def request(
    token_ids: list[int],
    *,
    n: int = 2,
    max_new_tokens: int = 8,
    temperature: float = 1.0,
    **options: Any,
) -> GenerateRequest:
    return GenerateRequest(
        token_ids=token_ids,
        n=n,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        **options,
    )


def generate_together(engine: EmbeddedEngine, *requests: GenerateRequest) -> list[list[Generation]]:
    async def together() -> list[list[Generation]]:
        return await asyncio.gather(*(engine.generate(request) for request in requests))

    return asyncio.run(together())


def generate(engine: EmbeddedEngine, asked: GenerateRequest) -> list[Generation]:
    return generate_together(engine, asked)[0]


def tokens_of(generations: list[Generation]) -> list[list[int]]:
    return [generation.token_ids for generation in generations]


def assert_sampled_from(
    path: Path, prompt: list[int], answer: Generation, temperature: float = 1.0
) -> None:
    """The answer's logprobs are the model's, by plain transformers on this sequence alone."""
    reference = reference_logprobs(path, prompt, answer.token_ids, temperature)
    assert (reference - torch.tensor(answer.logprobs)).abs().max() < 1e-5


def assert_serves(engine: EmbeddedEngine, path: Path) -> None:
    answer = generate(engine, request([5, 6]))[0]
    assert answer.versions == [(0, engine.policy_version())]
    assert_sampled_from(path, [5, 6], answer)


def test_is_an_engine(engine: EmbeddedEngine) -> None:
    assert isinstance(engine, Engine)
    assert engine.policy_version() == 0


def test_released_memory_comes_back_with_the_weights_that_are_sent(
    tiny_model: Path, other_model: Path
) -> None:
    engine = make_engine(other_model)
    for version in (3, 4):
        engine.release_memory()
        parameters = list(engine._model.parameters())
        left = [parameter.untyped_storage().nbytes() for parameter in parameters]
        assert left == [4] * len(parameters), "an element of each, which keeps its shape"
        engine.resume_memory("weights")
        engine.update_weights_from_disk(str(tiny_model), version)
        engine.resume_memory("cache")
    assert_serves(engine, tiny_model)


def test_logprobs_of_a_padded_batch_are_those_of_each_sequence_alone(
    engine: EmbeddedEngine, tiny_model: Path
) -> None:
    """Prompts of different lengths, limits and temperatures in one batch."""
    requests = [
        request([7]),
        request([5, 6, 7, 8, 9, 10, 11], temperature=0.7, max_new_tokens=12),
        request([250, 3, 99], temperature=1.5, max_new_tokens=3),
    ]
    answered = generate_together(engine, *requests)
    for asked, answers in zip(requests, answered, strict=True):
        assert len(answers) == asked.n
        for answer in answers:
            assert len(answer.token_ids) == asked.max_new_tokens
            assert answer.status is Status.TRUNCATED
            assert_sampled_from(tiny_model, list(asked.token_ids), answer, asked.temperature)


def test_logits_are_of_float32_in_a_bfloat16_model(tiny_model: Path) -> None:
    """As the trainer's: products of bfloat16 hidden states and weights, summed in float32.
    bfloat16 logits of this model are rounded by 1e-3 and more.
    """
    engine = EmbeddedEngine(model_path=str(tiny_model), dtype="bfloat16", device="cpu", seed=0)
    answers = generate(engine, request([5, 6, 7], n=64, max_new_tokens=1))
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    with torch.no_grad():
        hidden = model.get_decoder()(torch.tensor([[5, 6, 7]])).last_hidden_state[0, -1]
        logprobs = (model.lm_head.weight.float() @ hidden.float()).log_softmax(-1)
        rounded = (model.lm_head.weight @ hidden).float().log_softmax(-1)
    tokens = torch.tensor([answer.token_ids[0] for answer in answers])
    got = torch.tensor([answer.logprobs[0] for answer in answers])
    torch.testing.assert_close(got, logprobs[tokens], rtol=0, atol=1e-5)
    assert (rounded - logprobs)[tokens].abs().max() > 1e-4


def test_tokens_follow_the_distribution(engine: EmbeddedEngine, tiny_model: Path) -> None:
    """4,000 first tokens at temperature 0.7: for 40 of the vocabulary, their share is
    the model's probability."""
    prompt = [5, 6, 7]
    answers = generate(engine, request(prompt, n=4000, max_new_tokens=1, temperature=0.7))
    first_tokens = torch.tensor([answer.token_ids[0] for answer in answers])
    shares = torch.bincount(first_tokens, minlength=VOCAB_SIZE)[:40] / 4000
    logprobs = [reference_logprobs(tiny_model, prompt, [token], 0.7)[0] for token in range(40)]
    assert (shares - torch.stack(logprobs).exp()).abs().max() < 0.03


def test_pick_inverts_the_cumulative_distribution() -> None:
    probs = torch.tensor([[0.5, 0.0, 0.25, 0.25]]).repeat(5, 1)
    randoms = torch.tensor([0.0, 0.49, 0.5, 0.76, 1.0 - 1e-12], dtype=torch.float64)
    assert pick(probs, randoms).tolist() == [0, 0, 2, 3, 3]


def test_top_k_and_top_p_limit_the_tokens_but_not_the_logprobs(
    engine: EmbeddedEngine, tiny_model: Path
) -> None:
    of_top_3 = generate(engine, request([5], n=300, max_new_tokens=1, top_k=3))
    of_best = generate(engine, request([5], n=300, max_new_tokens=1, top_p=1e-6))
    top_3 = {answer.token_ids[0] for answer in of_top_3}
    best = {answer.token_ids[0] for answer in of_best}
    assert len(top_3) == 3
    assert len(best) == 1
    assert best < top_3
    answer = of_best[0]
    assert_sampled_from(tiny_model, [5], answer)
    # The best token is not certain in the whole distribution.
    assert answer.logprobs[0] < -0.1


def test_a_seed_decides_the_samples_whatever_else_is_in_the_batch(
    engine: EmbeddedEngine, tiny_model: Path
) -> None:
    seeded = request([5, 6], seed=11)
    alone = generate(engine, seeded)
    other_engine = make_engine(tiny_model, seed=5)
    _, crowded = generate_together(other_engine, request([1] * 9, max_new_tokens=20), seeded)
    assert tokens_of(alone) == tokens_of(crowded)
    assert alone[0].token_ids != alone[1].token_ids
    otherwise_seeded = generate(engine, request([5, 6], seed=12))
    assert otherwise_seeded[0].token_ids != alone[0].token_ids


def test_engines_of_one_seed_agree_call_by_call(tiny_model: Path) -> None:
    one = make_engine(tiny_model, seed=3)
    other = make_engine(tiny_model, seed=3)
    first = tokens_of(generate(one, request([5])))
    assert tokens_of(generate(other, request([5]))) == first
    assert tokens_of(generate(one, request([5]))) != first


def test_stop_tokens_end_a_sequence_and_are_part_of_it(engine: EmbeddedEngine) -> None:
    answer = generate(engine, request([5], n=1, seed=1))[0]
    stop = answer.token_ids[3]
    stopped = generate(engine, request([5], n=1, seed=1, stop_token_ids=(stop,)))[0]
    num_tokens = answer.token_ids.index(stop) + 1
    assert stopped.token_ids == answer.token_ids[:num_tokens]
    assert stopped.status is Status.COMPLETED
    assert len(stopped.logprobs) == num_tokens


def test_a_token_outside_the_vocabulary_is_refused(engine: EmbeddedEngine) -> None:
    with pytest.raises(RunError, match=f"embedded: token id {VOCAB_SIZE} at position 1"):
        generate(engine, request([5, VOCAB_SIZE]))


def test_a_prompt_that_fills_the_context_is_an_error_of_its_samples_only(
    engine: EmbeddedEngine,
) -> None:
    full, fine = generate_together(engine, request([5] * 4096), request([5]))
    assert [answer.status for answer in full] == [Status.ERROR] * 2
    assert "4096 tokens" in str(full[0].error)
    assert len(fine[0].token_ids) == 8


def test_a_prompt_is_scored_between_two_tokens_of_a_batch_which_goes_on(
    engine: EmbeddedEngine, tiny_model: Path
) -> None:
    """Also while the engine is paused; then the batch waits for it to be resumed."""
    prompt = list(range(40, 60))
    expected = reference_logprobs(tiny_model, prompt[:1], prompt[1:], 1.0)
    request = GenerateRequest([7, 8], n=1, max_new_tokens=400, temperature=1.0, seed=3)

    async def scored() -> list[Generation]:
        running = asyncio.create_task(engine.generate(request))
        while not engine._busy.locked():
            await asyncio.sleep(0.001)
        found = [await asyncio.to_thread(engine.score, prompt)]
        assert not running.done()
        await asyncio.to_thread(engine.pause)
        found.append(await asyncio.to_thread(engine.score, prompt))
        assert not running.done() and not engine._busy.locked()
        engine.resume()
        for logprobs, version in found:
            assert version == 0
            assert (torch.tensor(logprobs) - expected).abs().max() < 1e-4
        return await running

    [answer] = asyncio.run(scored())
    assert len(answer.token_ids) == 400
    [alone] = asyncio.run(engine.generate(request))
    assert alone.token_ids == answer.token_ids


def test_requests_wait_while_paused(engine: EmbeddedEngine) -> None:
    async def paused() -> list[Generation]:
        engine.pause()
        waiting = asyncio.create_task(engine.generate(request([5])))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        engine.resume()
        return await asyncio.wait_for(waiting, 20)

    assert len(asyncio.run(paused())) == 2


async def num_sampled(engine: EmbeddedEngine, at_least: int) -> None:
    """Returns once each request has so many tokens."""

    def sampled() -> list[int]:
        return [len(s.token_ids) for job in engine._waiting for s in job.sequences]

    async with asyncio.timeout(20):
        while min(sampled(), default=0) < at_least:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_request_outlives_an_update_and_says_which_version_sampled_what(
    engine: EmbeddedEngine, tiny_model: Path, other_model: Path, mode: PauseMode
) -> None:
    """The event loop goes on while a batch runs. The tokens are each version's own."""

    async def updated() -> list[Generation]:
        answer = asyncio.create_task(engine.generate(request([5, 6], max_new_tokens=400)))
        await num_sampled(engine, 3)
        await asyncio.to_thread(engine.pause, mode)
        assert not answer.done()
        await asyncio.to_thread(engine.update_weights_from_disk, str(other_model), 1)
        engine.resume()
        return await answer

    for answer in asyncio.run(updated()):
        (first, old), (middle, new) = answer.versions
        assert (first, old, new) == (0, 0, 1) and 3 <= middle < 400
        assert answer.status is Status.TRUNCATED and len(answer.token_ids) == 400
        by_old = reference_logprobs(tiny_model, [5, 6], answer.token_ids, 1.0)
        by_new = reference_logprobs(other_model, [5, 6], answer.token_ids, 1.0)
        expected = torch.cat([by_old[:middle], by_new[middle:]])
        assert (expected - torch.tensor(answer.logprobs)).abs().max() < 1e-4


@pytest.mark.parametrize("ends", ["interrupt", "pause"])
def test_an_interrupted_request_has_the_tokens_that_were_sampled(tmp_path: Path, ends: str) -> None:
    """They are those of a request that nobody ends, with their logprobs and experts; who asks
    again with them gets what comes after, and the experts of all."""
    path = save_mixture_of_experts(tmp_path, seed=0)
    engine = make_engine(path)
    whole = generate(engine, request([5, 6], max_new_tokens=60, seed=3))

    async def interrupted() -> list[Generation]:
        answer = asyncio.create_task(engine.generate(request([5, 6], max_new_tokens=60, seed=3)))
        await num_sampled(engine, 3)
        if ends == "interrupt":
            await asyncio.to_thread(engine.interrupt)
        else:
            await asyncio.to_thread(engine.pause, "abort")
            engine.resume()
        return await answer

    for answer, uninterrupted in zip(asyncio.run(interrupted()), whole, strict=True):
        num_tokens = len(answer.token_ids)
        assert answer.status is Status.ABORTED and 3 <= num_tokens < 60
        assert answer.token_ids == uninterrupted.token_ids[:num_tokens]
        assert answer.logprobs == pytest.approx(uninterrupted.logprobs[:num_tokens])
        assert answer.versions == [(0, 0)]
        known = [5, 6, *answer.token_ids]
        assert torch.equal(experts_of(answer), routed_experts(path, known[:-1]))
        (rest,) = generate(engine, request(known, n=1, max_new_tokens=5))
        expected = routed_experts(path, [*known, *rest.token_ids[:-1]])
        assert torch.equal(experts_of(rest), expected)


def test_experts_of_a_request_that_was_stopped_are_those_that_sampled_its_tokens(
    tmp_path: Path,
) -> None:
    path = save_mixture_of_experts(tmp_path, seed=0)
    engine = make_engine(path)

    async def stopped() -> list[Generation]:
        answer = asyncio.create_task(engine.generate(request([5, 6], max_new_tokens=60)))
        await num_sampled(engine, 3)
        await asyncio.to_thread(engine.pause)
        engine.resume()
        return await answer

    for answer in asyncio.run(stopped()):
        expected = routed_experts(path, [5, 6, *answer.token_ids[:-1]])
        assert torch.equal(experts_of(answer), expected)


def experts_of(answer: Generation) -> Tensor:
    assert answer.routed_experts is not None
    return torch.from_numpy(answer.routed_experts).long()


def test_an_interrupt_ends_requests_that_wait_and_leaves_later_ones_alone(
    engine: EmbeddedEngine,
) -> None:
    async def interrupted() -> list[Generation]:
        engine.pause()
        waiting = asyncio.create_task(engine.generate(request([5])))
        await asyncio.sleep(0.05)
        engine.interrupt()
        engine.resume()
        return [*await waiting, *await engine.generate(request([5]))]

    answers = asyncio.run(interrupted())
    assert [answer.status for answer in answers] == [Status.ABORTED] * 2 + [Status.TRUNCATED] * 2
    assert [len(answer.token_ids) for answer in answers] == [0, 0, 8, 8]


def test_a_batch_that_nobody_waits_for_ends(engine: EmbeddedEngine) -> None:
    async def cancelled() -> float:
        given_up = asyncio.create_task(engine.generate(request([5], max_new_tokens=4000)))
        await num_sampled(engine, 3)
        given_up.cancel()
        start = time.monotonic()
        await engine.generate(request([5], max_new_tokens=1))
        return time.monotonic() - start

    assert asyncio.run(cancelled()) < 3


def test_requests_that_are_started_together_are_one_batch(
    engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where some come a few turns of the event loop after the first."""
    sizes = []
    sample = embedded_model.sample_batch

    def watched(model: Any, sequences: Any, *rest: Any) -> None:
        sizes.append(len(sequences))
        sample(model, sequences, *rest)

    monkeypatch.setattr(embedded_model, "sample_batch", watched)

    async def late(turns: int) -> list[Generation]:
        for _ in range(turns):
            await asyncio.sleep(0)
        return await engine.generate(request([5]))

    async def together() -> None:
        await asyncio.gather(*(late(turns) for turns in range(20)))

    asyncio.run(together())
    assert sizes == [40]


def test_an_error_of_a_forward_reaches_whoever_waits(
    engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise MemoryError("no memory is left")

    with monkeypatch.context() as patch:
        patch.setattr(engine._model, "forward", broken)
        with pytest.raises(MemoryError, match="no memory is left"):
            generate(engine, request([5]))
    assert len(generate(engine, request([5]))) == 2


def test_a_closed_engine_has_ended_its_requests_and_its_thread(engine: EmbeddedEngine) -> None:
    async def closed() -> list[Generation]:
        answer = asyncio.create_task(engine.generate(request([5], max_new_tokens=4000)))
        await num_sampled(engine, 3)
        await asyncio.to_thread(engine.close)
        return await answer

    before = threading.active_count()
    answers = asyncio.run(closed())
    assert [answer.status for answer in answers] == [Status.ABORTED] * 2
    assert threading.active_count() <= before


def test_weights_from_disk_and_in_process(
    engine: EmbeddedEngine, tiny_model: Path, other_model: Path
) -> None:
    engine.update_weights_from_disk(str(other_model), 1)
    assert engine.policy_version() == 1
    assert_serves(engine, other_model)

    engine.load_weights(load_file(tiny_model / "model.safetensors").items(), 2)
    assert engine.policy_version() == 2
    assert_serves(engine, tiny_model)


@dataclass(frozen=True)
class Fault:
    """A tensor that a directory changes, or lacks (None), and how the engine refuses it."""

    tensor: str
    value: Tensor | None
    message: str


FAULTS = {
    "unknown": Fault(
        "model.nrom.weight",
        torch.ones(64),
        "unknown tensor 'model.nrom.weight'; the engine's checkpoint has .*'lm_head.weight'",
    ),
    "missing": Fault("model.norm.weight", None, "1 of 25 tensors missing: model.norm.weight"),
    "shape": Fault(
        "model.norm.weight", torch.ones(3), r"shape \[3\], the engine's checkpoint \[64\]"
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_refused_weights_change_nothing(
    engine: EmbeddedEngine, tiny_model: Path, other_model: Path, tmp_path: Path, name: str
) -> None:
    fault = FAULTS[name]
    tensors = load_file(other_model / "model.safetensors")
    if fault.value is None:
        del tensors[fault.tensor]
    else:
        tensors[fault.tensor] = fault.value
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(RunError, match=f"embedded refused version 4: .*{fault.message}"):
        engine.update_weights_from_disk(str(tmp_path), 4)
    assert engine.policy_version() == 0
    assert_serves(engine, tiny_model)


def test_a_repeated_name_is_refused(engine: EmbeddedEngine, tiny_model: Path) -> None:
    tensors = list(load_file(tiny_model / "model.safetensors").items())
    with pytest.raises(RunError, match="came twice"):
        engine.load_weights([*tensors, tensors[0]], 1)


def test_tied_embeddings(tmp_path: Path) -> None:
    first = save_tiny_model(tmp_path / "a", 0, tie=True)
    second = save_tiny_model(tmp_path / "b", 1, tie=True)
    engine = make_engine(first)
    engine.update_weights_from_disk(str(second), 1)
    assert_serves(engine, second)


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3"])
def test_layers_of_multi_token_prediction_in_the_files_are_no_part_of_an_update(
    family: str, tmp_path: Path
) -> None:
    """An update has what is trained; the files of the engine's model have more."""
    changes = {"num_key_value_heads": 4} if family == "deepseek_v3" else {}
    path = save_model(tmp_path / "a", family, **changes)
    trained = load_file(path / "model.safetensors")
    add_mtp(path)
    every = load_file(path / "model.safetensors")
    engine = make_engine(path)
    engine.load_weights(trained.items(), 1)
    engine.update_weights_from_disk(str(path), 2)
    assert engine.policy_version() == 2
    assert_serves(engine, path)
    lacking = {name: tensor for name, tensor in every.items() if name != "model.norm.weight"}
    with pytest.raises(RunError, match=f"1 of {len(trained)} tensors missing: model.norm.weight"):
        engine.load_weights(lacking.items(), 3)
    beyond = {**trained, "model.layers.5.enorm.weight": torch.ones(32)}
    with pytest.raises(RunError, match="unknown tensor 'model.layers.5.enorm.weight'"):
        engine.load_weights(beyond.items(), 3)


@pytest.mark.parametrize("sends_head", [False, True])
def test_a_tied_head_in_the_files_may_be_sent_or_not(tmp_path: Path, sends_head: bool) -> None:
    paths = [save_tied_with_head(tmp_path / str(seed), seed) for seed in range(2)]
    engine = make_engine(paths[0])
    tensors = load_file(paths[1] / "model.safetensors")
    if not sends_head:
        del tensors["lm_head.weight"]
    engine.load_weights(tensors.items(), 1)
    assert_serves(engine, paths[1])
    with pytest.raises(RunError, match="tensor 'lm_head.weight' has shape"):
        engine.load_weights({**tensors, "lm_head.weight": torch.ones(2)}.items(), 2)


def save_mixture_of_experts(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
        eos_token_id=None,
        bos_token_id=None,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(path)
    return path


def test_mixture_of_experts_takes_checkpoint_names(tmp_path: Path) -> None:
    """transformers 5 fuses experts in memory; the weights come under the checkpoint's names."""
    first = save_mixture_of_experts(tmp_path / "a", seed=0)
    second = save_mixture_of_experts(tmp_path / "b", seed=1)
    engine = make_engine(first)
    engine.load_weights(load_file(second / "model.safetensors").items(), 1)
    assert_serves(engine, second)


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "mixtral", "glm4_moe", "deepseek_v3"])
def test_reports_the_experts_of_every_token_but_the_last(family: str, tmp_path: Path) -> None:
    """In a padded batch whose sequences end at different steps, as transformers runs
    each alone."""
    changes = {"num_key_value_heads": 4} if family == "deepseek_v3" else {}
    path = save_model(tmp_path, family, **changes)
    requests = [
        request([7, 8], stop_token_ids=tuple(range(0, 250, 9))),
        request([5, 6, 7, 8, 9, 10, 11], max_new_tokens=12),
    ]
    answered = generate_together(make_engine(path), *requests)
    for asked, answers in zip(requests, answered, strict=True):
        for answer in answers:
            reported = answer.routed_experts
            expected = routed_experts(path, [*asked.token_ids, *answer.token_ids[:-1]])
            assert reported is not None
            assert reported.dtype == "uint8"
            assert torch.equal(torch.from_numpy(reported).long(), expected)


def routed_experts(path: Path, token_ids: list[int]) -> Tensor:
    """[T, layers with experts, topk] by plain transformers: the choices that experts
    are given."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    chosen: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        chosen.append(arguments[1])

    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(keep)
    with torch.no_grad():
        model(torch.tensor([token_ids]))
    return torch.stack(chosen, 1)


def test_a_dense_model_has_no_experts_to_report(engine: EmbeddedEngine) -> None:
    assert generate(engine, request([7]))[0].routed_experts is None


def test_a_text_ends_a_response_and_stays_in_it(engine: EmbeddedEngine, tiny_model: Path) -> None:
    """The text may lie across tokens; what comes before it and after it is not changed."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    (whole,) = generate(engine, request([1, 2, 3], n=1, max_new_tokens=40, seed=4))
    assert whole.status is Status.TRUNCATED
    for first in (0, 10):
        ids = whole.token_ids[first : first + 2]
        text = tokenizer.decode(ids)
        asked = request([1, 2, 3], n=1, max_new_tokens=40, seed=4, stop=("never there", text))
        (stopped,) = generate(engine, asked)
        assert stopped.status is Status.COMPLETED
        assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]
        assert stopped.logprobs == pytest.approx(whole.logprobs[: len(stopped.token_ids)])
        assert text in tokenizer.decode(stopped.token_ids)
        assert text not in tokenizer.decode(stopped.token_ids[:-1])
    (untouched,) = generate(
        engine, request([1, 2, 3], n=1, max_new_tokens=40, seed=4, stop=("never there",))
    )
    assert untouched.token_ids == whole.token_ids
    (by_token,) = generate(
        engine, request([1, 2, 3], n=1, seed=4, stop_token_ids=(whole.token_ids[1],))
    )
    assert by_token.token_ids == whole.token_ids[: whole.token_ids.index(whole.token_ids[1]) + 1]
    assert by_token.status is Status.COMPLETED
