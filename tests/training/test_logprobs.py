"""Token logprobs and entropies against torch's log_softmax of whole logits: packed,
padded, at a temperature, in chunks, with the vocabulary split.
"""

import itertools
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from nanoslime.training import logprobs
from nanoslime.training.logprobs import linear_logprobs, token_logprobs


@pytest.fixture(params=[1, 4, 8192])
def columns(request, monkeypatch):
    """The columns of a block."""
    monkeypatch.setattr(logprobs, "CHUNK_COLUMNS", request.param)
    return request.param


CU_SEQLENS = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
TOKENS = 9
HIDDEN = 6
VOCAB = 11
PADDED = 16


def problem(dtype=torch.float32):
    """hidden [9, 6], weight [16, 6], targets [9], and two gradients [9].

    The padding of the weight would swallow the softmax.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    hidden[:, 0] = hidden[:, 0].abs() + 1
    weight = torch.randn(PADDED, HIDDEN, generator=generator)
    weight[VOCAB:, 0] = 50
    upstream = torch.randn(2, TOKENS, generator=generator, dtype=dtype)
    return (
        hidden.to(dtype),
        weight.to(dtype),
        torch.randint(0, VOCAB, (TOKENS,), generator=generator),
        upstream,
    )


def reference(hidden, weight, targets, temperature, vocab_size=VOCAB):
    """Logprobs and entropies [T] by float64 logits of all tokens.

    Gradients of hidden and weight come in their own types.
    """
    logits = hidden.double() @ weight[:vocab_size].double().T
    log_probs = (logits / temperature).log_softmax(dim=1)
    entropy = -(log_probs.exp() * log_probs).sum(dim=1)
    return log_probs.gather(1, targets[:, None]).squeeze(1), entropy


def results(function, hidden, weight, targets, upstream, **options):
    """Logprobs, entropy and the gradients of hidden and weight."""
    hidden = hidden.clone().requires_grad_()
    weight = weight.clone().requires_grad_()
    logprobs, entropy = function(hidden, weight, targets, **options)
    loss = (logprobs * upstream[0]).sum()
    if entropy is not None:
        loss = loss + (entropy * upstream[1]).sum()
    loss.backward()
    return (
        logprobs.detach(),
        None if entropy is None else entropy.detach(),
        hidden.grad,
        weight.grad,
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 9, 1024])
def test_values_and_gradients_are_those_of_log_softmax(temperature, chunk_tokens, columns):
    case = problem()
    options = dict(
        temperature=temperature, vocab_size=VOCAB, with_entropy=True, chunk_tokens=chunk_tokens
    )
    got = results(linear_logprobs, *case, **options)
    expected = results(reference, *case, temperature=temperature)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs.float())
    assert got[3][VOCAB:].abs().max() == 0  # padding gets no gradient


def test_without_entropy_the_rest_is_the_same(columns):
    case = problem()
    options = dict(temperature=0.7, vocab_size=VOCAB, chunk_tokens=4)
    logprobs, entropy, d_hidden, d_weight = results(linear_logprobs, *case, **options)
    hidden, weight, targets, upstream = case
    unused = torch.stack([upstream[0], torch.zeros(TOKENS)])
    with_entropy = results(
        linear_logprobs, hidden, weight, targets, unused, **options, with_entropy=True
    )
    assert entropy is None and torch.equal(logprobs, with_entropy[0])
    torch.testing.assert_close((d_hidden, d_weight), with_entropy[2:])


def test_gradients_pass_gradcheck_in_float64(columns):
    hidden, weight, targets, _ = problem(torch.float64)

    def both(hidden, weight):
        options = dict(temperature=0.8, vocab_size=VOCAB, with_entropy=True, chunk_tokens=4)
        return linear_logprobs(hidden, weight, targets, **options)

    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(both, inputs)


def test_bfloat16_is_multiplied_into_float32(columns):
    hidden, weight, targets, upstream = problem()
    case = (hidden.bfloat16(), weight.bfloat16(), targets, upstream)
    options = dict(temperature=0.5, vocab_size=VOCAB, with_entropy=True, chunk_tokens=4)
    got = results(linear_logprobs, *case, **options)
    expected = results(reference, *case, temperature=0.5)
    torch.testing.assert_close(got[:2], tuple(x.float() for x in expected[:2]))
    assert got[2].dtype == got[3].dtype == torch.bfloat16
    for ours, theirs in zip(got[2:], expected[2:], strict=True):
        # One rounding of the sum apart.
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


def test_no_tensor_has_all_tokens_and_the_whole_vocabulary():
    """The largest allocation of both passes is a block of logits, or the weight's
    gradient.
    """
    hidden = torch.randn(512, 8)
    weight = torch.randn(4000, 8)
    targets = torch.randint(0, 4000, (512,))
    with torch.profiler.profile(profile_memory=True, record_shapes=True) as profile:
        options = dict(temperature=1.0, vocab_size=4000, with_entropy=True, chunk_tokens=16)
        results(linear_logprobs, hidden, weight, targets, torch.randn(2, 512), **options)
    sizes = [e.cpu_memory_usage for e in profile.events()]
    assert max(sizes) >= 16 * 4000 * 4  # it was measured
    assert max(sizes) <= 2 * 16 * 4000 * 4


def test_first_token_of_each_sequence_is_exactly_zero_and_sequences_do_not_meet():
    hidden, weight, token_ids, _ = problem()
    hidden.requires_grad_()
    options = dict(temperature=0.7, vocab_size=VOCAB, with_entropy=True)
    got, entropy = token_logprobs(hidden, weight, token_ids, CU_SEQLENS, **options)
    for start, stop in itertools.pairwise(CU_SEQLENS.tolist()):
        assert got[start] == entropy[start] == 0
        here = slice(start, stop - 1)
        after = slice(start + 1, stop)
        expected = reference(hidden[here], weight, token_ids[after], 0.7)
        torch.testing.assert_close(got[after], expected[0].float())
        torch.testing.assert_close(entropy[after], expected[1].float())
    (got + entropy).sum().backward()
    # The last row of each sequence predicts nothing.
    assert hidden.grad[[2, 3, 8]].abs().max() == 0
    assert hidden.grad[[0, 1, 4, 5, 6, 7]].abs().amax(dim=1).min() > 0


def test_unusable_input_is_refused():
    hidden, weight, token_ids, _ = problem()
    with pytest.raises(ValueError, match="temperature=0"):
        token_logprobs(hidden, weight, token_ids, CU_SEQLENS, temperature=0, vocab_size=VOCAB)
    with pytest.raises(ValueError, match="outside the vocabulary of 3 tokens"):
        token_logprobs(hidden, weight, token_ids, CU_SEQLENS, temperature=1, vocab_size=3)
    for outside in (-1, -100, VOCAB):
        token_ids[4] = outside
        with pytest.raises(ValueError, match=f"token id {outside} is outside the vocabulary of"):
            token_logprobs(hidden, weight, token_ids, CU_SEQLENS, temperature=1, vocab_size=VOCAB)


def split_over_ranks(env, vocab_size, with_entropy, columns):
    hidden, weight, targets, upstream = problem()
    width = PADDED // env.world_size
    options = dict(
        temperature=0.7, vocab_size=vocab_size, with_entropy=with_entropy, chunk_tokens=4
    )
    place = dict(vocab_start=env.rank * width, tp_group=dist.group.WORLD)
    rows = weight[env.rank * width :][:width]
    with mock.patch.object(logprobs, "CHUNK_COLUMNS", columns):
        return results(
            linear_logprobs, hidden, rows, targets % vocab_size, upstream, **options, **place
        )


# With 7, the second rank holds nothing but padding.
@pytest.mark.parametrize("vocab_size", [VOCAB, 7])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_vocabulary_split_over_two_ranks_changes_nothing(
    two_ranks, vocab_size, with_entropy, columns
):
    hidden, weight, targets, upstream = problem()
    options = dict(temperature=0.7, vocab_size=vocab_size, with_entropy=with_entropy)
    whole = results(linear_logprobs, hidden, weight, targets % vocab_size, upstream, **options)
    by_rank = two_ranks(split_over_ranks, vocab_size, with_entropy, columns)
    for values, entropy, d_hidden, _ in by_rank:
        torch.testing.assert_close((values, d_hidden), (whole[0], whole[2]))
        torch.testing.assert_close(entropy, whole[1])
    assert torch.equal(by_rank[0][2], by_rank[1][2])
    d_weight = torch.cat([d_rows for *_, d_rows in by_rank])
    torch.testing.assert_close(d_weight, whole[3])


@pytest.mark.parametrize("tokens", [[1], [2, 5, 8], [1, 2, 5, 6, 7, 8]])
def test_some_tokens_alone_have_the_values_and_gradients_of_all(tokens):
    hidden, weight, targets, upstream = problem()
    only = torch.tensor(tokens)
    in_loss = torch.zeros(TOKENS).index_fill(0, only, 1.0)
    options = dict(temperature=0.7, vocab_size=VOCAB, with_entropy=True)

    def of_all(hidden, weight, targets):
        return token_logprobs(hidden, weight, targets, CU_SEQLENS, **options)

    def of_some(hidden, weight, targets):
        return token_logprobs(hidden, weight, targets, CU_SEQLENS, only=only, **options)

    expected = results(of_all, hidden, weight, targets, upstream * in_loss)
    found = results(of_some, hidden, weight, targets, upstream)
    for values, all_values in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(values, all_values * in_loss)
    for gradient, all_gradient in zip(found[2:], expected[2:], strict=True):
        torch.testing.assert_close(gradient, all_gradient)
