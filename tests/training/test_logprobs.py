"""Token logprobs against torch's log_softmax: packed, padded, at a temperature, with the vocabulary split."""

import itertools

import pytest
import torch
import torch.distributed as dist

from nanoslime.training import logprobs as module
from nanoslime.training.logprobs import token_logprobs

CU_SEQLENS = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
VOCAB, PADDED = 11, 16


def problem():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, PADDED, generator=generator) * 3
    logits[:, VOCAB:] = 50  # padding that would swallow the softmax
    return logits, torch.randint(0, VOCAB, (9,), generator=generator), torch.randn(9, generator=generator)


def reference(logits, token_ids, temperature):
    result = torch.zeros(len(token_ids))
    for start, stop in itertools.pairwise(CU_SEQLENS.tolist()):
        for t in range(start + 1, stop):
            result[t] = (logits[t - 1, :VOCAB].float() / temperature).log_softmax(0)[token_ids[t]]
    return result


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("rows_at_a_time", [4, 1024])
def test_value_and_gradient_are_those_of_log_softmax(temperature, rows_at_a_time, monkeypatch):
    monkeypatch.setattr(module, "_ROWS_AT_A_TIME", rows_at_a_time)
    logits, token_ids, upstream = problem()
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    got = token_logprobs(ours, token_ids, CU_SEQLENS, temperature=temperature, vocab_size=VOCAB)
    expected = reference(theirs, token_ids, temperature)
    torch.testing.assert_close(got, expected)
    (got * upstream).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert torch.equal(ours.detach(), logits)  # left as it was
    assert ours.grad[:, VOCAB:].abs().max() == 0


def test_first_token_of_each_sequence_is_exactly_zero_and_sequences_do_not_meet():
    logits, token_ids, _ = problem()
    logits.requires_grad_()
    got = token_logprobs(logits, token_ids, CU_SEQLENS, temperature=1.0, vocab_size=VOCAB)
    assert got[[0, 3, 4]].tolist() == [0, 0, 0] and (got[[1, 2, 5, 6, 7, 8]] < 0).all()
    got.sum().backward()
    assert logits.grad[[2, 3, 8]].abs().max() == 0  # the last row of each sequence predicts nothing
    assert logits.grad[[0, 1, 4, 5, 6, 7]].abs().amax(dim=1).min() > 0


def test_bfloat16_logits_are_computed_in_float32():
    logits, token_ids, _ = problem()
    half = logits.bfloat16().requires_grad_()
    got = token_logprobs(half, token_ids, CU_SEQLENS, temperature=0.5, vocab_size=VOCAB)
    torch.testing.assert_close(got, reference(half.detach(), token_ids, 0.5))
    got.sum().backward()
    assert got.dtype == torch.float32 and half.grad.dtype == torch.bfloat16


def test_unusable_input_is_refused():
    logits, token_ids, _ = problem()
    with pytest.raises(ValueError, match="temperature=0"):
        token_logprobs(logits, token_ids, CU_SEQLENS, temperature=0, vocab_size=VOCAB)
    with pytest.raises(ValueError, match="outside the vocabulary of 3 tokens"):
        token_logprobs(logits, token_ids, CU_SEQLENS, temperature=1, vocab_size=3)


def split_over_ranks(env, vocab_size):
    logits, token_ids, upstream = problem()
    width = PADDED // env.world_size
    local = logits[:, env.rank * width :][:, :width].clone().requires_grad_()
    got = token_logprobs(
        local,
        token_ids % vocab_size,
        CU_SEQLENS,
        temperature=0.7,
        vocab_size=vocab_size,
        vocab_start=env.rank * width,
        tp_group=dist.group.WORLD,
    )
    (got * upstream).sum().backward()
    return got.detach(), local.grad


@pytest.mark.parametrize("vocab_size", [VOCAB, 7])  # 7: the second rank holds nothing but padding
def test_vocabulary_split_over_two_ranks_changes_nothing(two_ranks, vocab_size):
    logits, token_ids, upstream = problem()
    logits.requires_grad_()
    whole = token_logprobs(logits, token_ids % vocab_size, CU_SEQLENS, temperature=0.7, vocab_size=vocab_size)
    (whole * upstream).sum().backward()
    results = two_ranks(split_over_ranks, vocab_size)
    for got, _ in results:
        torch.testing.assert_close(got, whole.detach())
    torch.testing.assert_close(torch.cat([grad for _, grad in results], dim=1), logits.grad)
