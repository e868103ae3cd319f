"""A rollout's view of the engines: interrupted requests go on, limits hold, transcripts replay."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanoslime.rollout import policy as policy_module
from nanoslime.rollout.engines.embedded_model import EmbeddedEngine
from nanoslime.rollout.policy import Call, Policy, ServedModel
from nanoslime.rollout.router import Router
from nanoslime.rollout.tasks import GroupTask, Sampling
from nanoslime.types import Generation, Prompt, Status
from tests.rollout.interrupting import InterruptingRouter
from tests.serving import reference_logprobs

PROMPT = [5, 6, 7]
GREEDY = Sampling(n_samples_per_prompt=4, max_new_tokens=9, temperature=0.7, top_k=1)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> EmbeddedEngine:
    return EmbeddedEngine(str(tiny_model), "float32", "cpu", seed=0)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def make_policy(engine, tokenizer):
    def make(
        pieces: Sequence[int] = (),
        *,
        sampling: Sampling = GREEDY,
        index: int = 0,
        context_length: int = 4096,
        transcript: Sequence[Call] = (),
    ) -> Policy:
        model = ServedModel(InterruptingRouter(engine, pieces), tokenizer, context_length)
        task = GroupTask(7, Prompt(0, np.array(PROMPT, np.int32), "", ""), sampling, 3, "none")
        return Policy(task, index, model, transcript)

    return make


def generate(policy: Policy, token_ids: Sequence[int] = PROMPT, **more) -> Generation:
    return asyncio.run(policy.generate(token_ids, **more))


@pytest.mark.parametrize(
    "pieces, versions",
    [
        ([4], [(0, 0), (4, 1)]),
        ([1, 1, 1], [(0, 0), (1, 1), (2, 2), (3, 3)]),
        ([8], [(0, 0), (8, 1)]),
        # An interruption before the first token leaves no span of the version it had then.
        ([0, 0, 3], [(0, 2), (3, 3)]),
        ([3, 0, 0], [(0, 0), (3, 3)]),
        # One after the last token does not continue.
        ([9], [(0, 0)]),
    ],
)
def test_an_interrupted_request_is_the_uninterrupted_one_with_spans(
    make_policy, tiny_model, pieces, versions
) -> None:
    whole = generate(make_policy())
    policy = make_policy(pieces)
    found = generate(policy)
    assert found.token_ids == whole.token_ids and len(found.token_ids) == 9
    assert found.status is Status.TRUNCATED and found.error is None
    assert found.versions == versions
    reference = reference_logprobs(tiny_model, PROMPT, found.token_ids, GREEDY.temperature)
    assert np.abs(np.array(found.logprobs) - reference.numpy()).max() < 1e-5
    requests = policy.model.router.requests
    for request in requests:
        already = len(request.token_ids) - len(PROMPT)
        assert list(request.token_ids) == [*PROMPT, *whole.token_ids[:already]]
        assert request.max_new_tokens == 9 - already
        assert request.n == 1
    assert len({request.seed for request in requests}) > len([n for n in pieces if 0 < n < 9])


def test_neighbouring_spans_of_one_version_are_one(make_policy) -> None:
    """A run that is saved interrupts its requests without new weights."""
    policy = make_policy([4])
    router = policy.model.router
    router.version = -1

    async def generate_at_one_version(request, key=""):
        router.version = 5
        return await InterruptingRouter.generate(router, request, key)

    policy.model = replace(policy.model, router=replace_generate(router, generate_at_one_version))
    assert generate(policy).versions == [(0, 5)]


def replace_generate(router, generate):
    class Other:
        pass

    other = Other()
    other.generate = generate
    return other


@pytest.mark.parametrize("first", [1, 2, 3])
def test_a_stop_text_that_an_interruption_cuts_in_two_ends_the_response(
    make_policy, tokenizer, first
) -> None:
    plain = generate(make_policy()).token_ids
    text = tokenizer.decode(plain[:4])
    whole = generate(make_policy(), stop=[text])
    assert whole.status is Status.COMPLETED and whole.token_ids == plain[:4]
    cut = generate(make_policy([first]), stop=[text])
    assert (cut.token_ids, cut.status) == (whole.token_ids, Status.COMPLETED)
    assert np.allclose(cut.logprobs, whole.logprobs, atol=1e-5)
    assert cut.versions == [(0, 0), (first, 1)]


def test_generations_of_a_rollout_share_its_limit(make_policy) -> None:
    policy = make_policy([2])
    first = generate(policy, max_new_tokens=4)
    assert len(first.token_ids) == 4
    assert policy.num_tokens_left == 5
    second = generate(policy, [*PROMPT, *first.token_ids, 9])
    assert (len(second.token_ids), second.status) == (5, Status.TRUNCATED)
    third = generate(policy)
    assert third == Generation([], [], Status.TRUNCATED, [])
    assert len(policy.model.router.requests) == 3


def test_requests_made_at_once_share_the_limit_too(make_policy) -> None:
    policy = make_policy()

    async def both() -> list[Generation]:
        return await asyncio.gather(*(policy.generate([n], max_new_tokens=6) for n in (5, 6)))

    assert [len(generation.token_ids) for generation in asyncio.run(both())] == [6, 3]


def test_a_later_turn_that_fills_the_context_is_truncated(make_policy) -> None:
    policy = make_policy(context_length=20)
    long = [5] * 16
    assert generate(policy, long[:12]).status is Status.TRUNCATED
    assert policy.model.router.requests[0].max_new_tokens == 8
    assert generate(policy, long) == Generation([], [], Status.TRUNCATED, [])
    assert len(policy.model.router.requests) == 1


def test_a_prompt_that_fills_the_context_is_for_the_engine_to_refuse(make_policy) -> None:
    found = generate(make_policy(), [5] * 4096)
    assert found.status is Status.ERROR
    assert "4096 tokens" in found.error


def test_each_request_of_each_sample_has_a_seed_of_its_own(make_policy) -> None:
    def seeds(index: int) -> list[int]:
        policy = make_policy([1], index=index)
        generate(policy, max_new_tokens=2)
        generate(policy, max_new_tokens=2)
        assert policy.rollout_id == 7 * 4 + index
        assert set(policy.model.router.keys) == {"train-7"}
        return [request.seed for request in policy.model.router.requests]

    assert seeds(0) == seeds(0)
    assert len({*seeds(0), *seeds(1)}) == 6


def test_engines_that_honour_no_seeds_get_none(make_policy) -> None:
    policy = make_policy()
    policy.model = replace(policy.model, honours_seeds=False)
    generate(policy, max_new_tokens=2)
    assert [request.seed for request in policy.model.router.requests] == [None]


def test_a_transcript_answers_and_its_last_request_goes_on(make_policy) -> None:
    """Saved in the middle of the second turn, and restored in another process."""

    async def two_turns(policy: Policy) -> list[Generation]:
        first = await policy.generate(PROMPT, max_new_tokens=3)
        return [first, await policy.generate([*PROMPT, *first.token_ids, 8])]

    whole = asyncio.run(two_turns(make_policy()))
    before = make_policy()
    saved: list[Call] = []
    router = before.model.router

    async def interrupted(request, key=""):
        if len(router.requests) == 1:
            cut = replace(request, max_new_tokens=2)
            [generation] = await InterruptingRouter.generate(router, cut, key)
            return [replace(generation, status=Status.ABORTED)]
        if len(router.requests) == 2:
            saved.extend(before.transcript)
        return await InterruptingRouter.generate(router, request, key)

    before.model = replace(before.model, router=replace_generate(router, interrupted))
    asyncio.run(two_turns(before))
    assert [len(call.generation.token_ids) for call in saved] == [3, 2]

    after = make_policy(transcript=saved)
    assert after.transcript == saved, "a run that is saved again at once loses nothing"
    after.model.router.version = 4
    found = asyncio.run(two_turns(after))
    assert [g.token_ids for g in found] == [g.token_ids for g in whole]
    assert [g.versions for g in found] == [[(0, 0)], [(0, 0), (2, 4)]]
    [request] = after.model.router.requests
    assert list(request.token_ids) == [*saved[1].token_ids, *saved[1].generation.token_ids]
    assert request.max_new_tokens == 9 - 3 - 2


def test_a_transcript_of_other_tokens_is_not_taken(make_policy) -> None:
    """The environment may do something else the second time; its limit is then its own."""
    saved = [Call([1, 2], Generation([3] * 9, [0.0] * 9, Status.COMPLETED, [(0, 0)]))]
    policy = make_policy(transcript=saved)
    found = generate(policy)
    assert found.token_ids == generate(make_policy()).token_ids


def test_a_request_that_is_interrupted_for_ever_is_given_up(make_policy, monkeypatch) -> None:
    monkeypatch.setattr("nanoslime.rollout.policy._PAUSE_S", 0.0)
    policy = make_policy([0] * 1000)
    assert generate(policy).status is Status.ABORTED
    assert len(policy.model.router.requests) == 100


def test_a_failed_continuation_keeps_its_cause_and_the_tokens(make_policy) -> None:
    policy = make_policy([2])
    router = policy.model.router

    async def failing(request, key=""):
        if router.requests:
            return [Generation([], [], Status.ERROR, [], error="no luck")]
        return await InterruptingRouter.generate(router, request, key)

    policy.model = replace(policy.model, router=replace_generate(router, failing))
    found = generate(policy)
    assert (len(found.token_ids), found.status, found.error) == (2, Status.ERROR, "no luck")
    assert found.versions == [(0, 0)]


@pytest.mark.parametrize("kind", ["embedded", pytest.param("sglang", marks=pytest.mark.sglang)])
def test_an_engine_that_is_interrupted_again_and_again_loses_no_token(
    kind, request, engine, tokenizer, tiny_model
) -> None:
    """Four rollouts at once, greedy: their tokens and logprobs are those of no interruption."""
    if kind == "sglang":
        engine = request.getfixturevalue("sglang_engine")
    sampling = replace(GREEDY, max_new_tokens=48)
    prompts = [[n, n + 1, n + 2] for n in range(4)]

    async def run(pauses: int) -> tuple[list[Generation], int]:
        router = Router([engine])
        model = ServedModel(router, tokenizer, 4096)
        policies = [
            Policy(GroupTask(n, Prompt(n, np.array(p), "", ""), sampling, 3, "none"), 0, model)
            for n, p in enumerate(prompts)
        ]
        going = [
            asyncio.create_task(policy.generate(p))
            for policy, p in zip(policies, prompts, strict=True)
        ]
        num_interrupted = 0
        while not all(task.done() for task in going) and num_interrupted < pauses:
            spent = [policy.num_tokens_left for policy in policies]
            await asyncio.sleep(0.01)
            await router.interrupt()
            num_interrupted += 0 < sum(spent) < 4 * 48
        found = await asyncio.gather(*going)
        return found, num_interrupted

    whole, _ = asyncio.run(run(0))
    pieces, num_interrupted = asyncio.run(run(4))
    assert num_interrupted > 2
    assert [g.token_ids for g in pieces] == [g.token_ids for g in whole]
    for one, other in zip(pieces, whole, strict=True):
        assert one.status is Status.TRUNCATED and one.versions == other.versions == [(0, 0)]
        assert np.allclose(one.logprobs, other.logprobs, atol=1e-4)


@pytest.mark.parametrize(
    "spans, num_tokens, expected",
    [
        ([(0, 5), (3, 6)], 3, [(0, 5)]),
        ([(0, 5), (0, 6)], 3, [(0, 6)]),
        ([(0, 5), (2, 6), (2, 5)], 4, [(0, 5)]),
        ([(0, 5)], 0, []),
    ],
)
def test_a_span_without_a_token_is_none(spans, num_tokens, expected) -> None:
    assert policy_module._without_empty(spans, num_tokens) == expected


def test_a_prompt_that_was_asked_for_twice_is_replayed_in_order(make_policy) -> None:
    saved = [Call(PROMPT, Generation([n], [-1.0], Status.COMPLETED, [(0, 0)])) for n in (20, 21)]
    policy = make_policy(transcript=saved)
    assert [generate(policy).token_ids for _ in range(2)] == [[20], [21]]
    assert policy.num_tokens_left == 9 - 2 and not policy.model.router.requests


def test_the_experts_of_tokens_that_came_back_are_kept(make_policy) -> None:
    policy = make_policy()
    experts = np.zeros((4, 1, 1), np.uint8)
    answers = [
        Generation([8, 9], [-1.0, -1.0], Status.ABORTED, [(0, 0)], routed_experts=experts),
        Generation([], [], Status.ERROR, [], error="no luck"),
    ]

    async def answer(request, key=""):
        return [answers.pop(0)]

    policy.model = replace(policy.model, router=replace_generate(None, answer))
    assert generate(policy).routed_experts is experts
