"""What is read from the bytes of an answer of SGLang, and what is refused."""

import json
from base64 import b64encode
from dataclasses import replace

import numpy as np
import pytest

from nanoslime.models.shape import ModelShape, MoE
from nanoslime.models.tiny import tiny_qwen3_config
from nanoslime.rollout.engines.sglang_answer import Asked, read_generations
from nanoslime.types import GenerateRequest, Generation, Status
from tests.rollout.engines.fake_sglang import one_sample

NUM_LAYERS = 3
TOPK = 2
NUM_PROMPT_TOKENS = 4
SAMPLE = one_sample(version=3)


def asked(
    num_samples: int = 1, *, layers: tuple[int, ...] = (0, 1, 2), num_experts: int = 128
) -> Asked:
    moe = MoE(
        layers=layers, num_experts=num_experts, num_experts_per_token=TOPK, intermediate_size=8
    )
    shape = ModelShape.from_config(tiny_qwen3_config())
    shape = replace(shape, num_layers=NUM_LAYERS, moe=moe)
    prompt = [1] * NUM_PROMPT_TOKENS
    request = GenerateRequest(prompt, num_samples, max_new_tokens=8, temperature=1.0)
    return Asked(request, vocab_size=100, experts_of=shape)


def dense() -> Asked:
    return replace(asked(), experts_of=None)


def experts(num_tokens: int, num_experts: int = 128) -> np.ndarray:
    """[NUM_PROMPT_TOKENS + num_tokens - 1, NUM_LAYERS, TOPK], as SGLang has them."""
    shape = (NUM_PROMPT_TOKENS + num_tokens - 1, NUM_LAYERS, TOPK)
    return np.random.default_rng(num_tokens).integers(0, num_experts, shape, dtype=np.int32)


def answer(num_tokens: int, routed: np.ndarray | None = None, text: str = "") -> dict:
    token_ids = list(range(num_tokens))
    meta = {
        "finish_reason": {"type": "length", "length": num_tokens},
        "weight_version": "3",
        "weight_versions": [{"version": "3", "start": 0, "end": num_tokens}],
        "output_token_logprobs": [[-0.5 * token, token, None] for token in token_ids],
    }
    if routed is not None:
        meta["routed_experts"] = b64encode(routed.tobytes()).decode()
    return {"text": text, "output_ids": token_ids, "meta_info": meta | {"cached_tokens": 0}}


def read(value: object, asked: Asked, **options: object) -> list[Generation]:
    return read_generations(json.dumps(value, **options).encode(), asked)


@pytest.mark.parametrize("options", [{}, {"separators": (",", ":")}, {"indent": 1}])
def test_each_sample_has_its_own_experts_whatever_its_text_says(options: dict) -> None:
    """The text has what experts begin with, in quotation marks and at the end of a string."""
    texts = ['"routed_experts": "AAAA"', '{"routed_experts":"', "routed_experts", "\\"]
    routed = [experts(number + 1) for number in range(len(texts))]
    answers = [answer(len(one) - 3, one, text) for one, text in zip(routed, texts, strict=True)]
    for number, generation in enumerate(read(answers, asked(len(texts)), **options)):
        assert generation.routed_experts.dtype == np.uint8
        assert np.array_equal(generation.routed_experts, routed[number])
        assert generation.token_ids == list(range(number + 1))
        assert generation.logprobs == [-0.5 * token for token in range(number + 1)]
        assert generation.versions == [(0, 3)]
        assert generation.status is Status.TRUNCATED


@pytest.mark.parametrize("num_experts", [128, 500])
def test_experts_of_one_byte_each_are_those_of_four(num_experts: int) -> None:
    """Those of one answer may all be below 256 where the model has more."""
    routed = experts(3)
    both = [
        read(answer(3, as_sent), asked(num_experts=num_experts))
        for as_sent in (routed, routed.astype(np.uint8))
    ]
    (wide,), (narrow,) = both
    assert wide.routed_experts.dtype == narrow.routed_experts.dtype
    assert np.array_equal(wide.routed_experts, narrow.routed_experts)


def test_layers_without_experts_are_left_out_and_many_experts_need_two_bytes() -> None:
    routed = experts(2, num_experts=500)
    [generation] = read(answer(2, routed), asked(layers=(0, 2), num_experts=500))
    assert generation.routed_experts.dtype == np.int16
    assert np.array_equal(generation.routed_experts, routed[:, [0, 2]])


def test_a_request_that_was_ended_while_it_waited_has_no_experts() -> None:
    ended = answer(0)
    ended["meta_info"]["finish_reason"] = {"type": "abort", "message": "Aborted"}
    [generation] = read(ended, asked())
    assert generation == Generation([], [], Status.ABORTED, [], error="Aborted")


def test_experts_that_were_not_asked_for_are_not_read() -> None:
    assert read(answer(2, experts(2)), dense())[0].routed_experts is None


def with_versions(*starts: int) -> bytes:
    sample = answer(2)
    sample["meta_info"]["weight_versions"] = [{"version": "3", "start": one} for one in starts]
    return json.dumps(sample).encode()


REFUSED = {
    "no JSON": b"<html>",
    "nothing": b"",
    "no UTF-8": b'{"text": "\xff\xfe"}',
    "another number of samples": json.dumps([SAMPLE, SAMPLE]).encode(),
    "no object": b"[3]",
    "an unknown end": json.dumps(SAMPLE).replace("length", "boredom").encode(),
    "NaN": json.dumps(one_sample(logprob=float("nan"))).encode(),
    "no logprob": json.dumps(one_sample(logprob=None)).encode(),
    "a text for a logprob": json.dumps(one_sample(logprob="-1")).encode(),
    "a token outside the vocabulary": json.dumps(one_sample(token=100)).encode(),
    "a negative token": json.dumps(one_sample(token=-1)).encode(),
    "half a token": json.dumps(one_sample(token=1.5)).encode(),
    "a text for a token": json.dumps(one_sample(token="7")).encode(),
    "a list for a token": json.dumps(one_sample(token=[7])).encode(),
    "true for a token": json.dumps(one_sample(token=True)).encode(),
    "more tokens than were asked for": json.dumps(answer(9)).encode(),
    "no token at an end": json.dumps(answer(0)).encode(),
    "a version of a token before the first": with_versions(-1, 1),
    "a first token of no version": with_versions(1),
    "versions out of order": with_versions(0, 2, 1),
    "a logprob too many": json.dumps(SAMPLE | {"output_ids": []}).encode(),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_generation_is_refused(what: str) -> None:
    with pytest.raises((ValueError, LookupError, TypeError, AttributeError)):
        read_generations(REFUSED[what], dense())


BAD_EXPERTS = {
    "none": None,
    "null": "null",
    "a number": "3",
    "of another length": '"AAAA"',
    "no base64": '"' + "*" * 48 + '"',
    "without an end": '"AAAA',
}


@pytest.mark.parametrize("what", BAD_EXPERTS)
def test_what_are_no_experts_is_refused(what: str) -> None:
    whole = json.dumps(answer(2, experts(2)))
    first = whole.index('"routed_experts": ')
    end = whole.index(', "cached_tokens"')
    text = BAD_EXPERTS[what]
    spoiled = "" if text is None else f'"routed_experts": {text}, '
    content = f"{whole[:first]}{spoiled}{whole[end + 2 :]}".encode()
    assert read_generations(whole.encode(), asked())
    with pytest.raises((ValueError, LookupError, TypeError, AttributeError)):
        read_generations(content, asked())
