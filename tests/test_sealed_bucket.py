"""Nothing but the next bucket of the same version, with all its bytes, has an unbroken seal."""

import pytest
import torch

from nanoslime.sealed_bucket import (
    HEADER_BYTES,
    Place,
    broken_seal,
    checksum,
    place_of,
    seal,
    word_sums,
    wrong_parts,
)

PARTS = [("gate", torch.float16, [10, 2]), ("up", torch.float16, [10, 2])]


def sealed(number: int = 0, version: int = 7, num_buckets: int = 3, nbytes: int = 100):
    generator = torch.Generator().manual_seed(nbytes)
    body = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)
    flat = torch.cat([torch.zeros(HEADER_BYTES, dtype=torch.uint8), body])
    seal(flat, Place(version, number, num_buckets), PARTS)
    return flat


@pytest.mark.parametrize("nbytes", [0, 1, 7, 8, 9, 100, 12_345])
def test_a_bucket_is_what_it_says(nbytes: int) -> None:
    flat = sealed(nbytes=nbytes)
    assert broken_seal(flat, None) is None
    assert place_of(flat) == Place(7, 0, 3)


def test_every_flipped_bit_is_seen() -> None:
    flat = sealed(nbytes=20)
    for position in range(HEADER_BYTES, flat.numel()):
        for bit in range(8):
            flat[position] ^= 1 << bit
            assert "not the bytes that were sent" in broken_seal(flat, None)
            flat[position] ^= 1 << bit
    assert broken_seal(flat, None) is None


@pytest.mark.parametrize(
    ("next_one", "problem"),
    [
        (sealed(2), "bucket 2 of version 7 came where 1 was next"),
        (sealed(0), "bucket 0 of version 7 came where 1 was next"),
        (sealed(1, version=6), "a bucket of another update, Place(version=6, number=1,"),
        (
            sealed(1, num_buckets=4),
            "a bucket of another update, Place(version=7, number=1, num_buckets=4",
        ),
        (sealed(1)[:-1], "163 bytes came of a bucket of 164"),
    ],
)
def test_another_bucket_than_the_next_is_refused(next_one: torch.Tensor, problem: str) -> None:
    first = sealed(0)
    assert problem in broken_seal(next_one, place_of(first))
    assert broken_seal(sealed(1), place_of(first)) is None


@pytest.mark.parametrize(
    "parts",
    [
        [("up", torch.float16, [10, 2]), ("gate", torch.float16, [10, 2])],
        [("gate", torch.bfloat16, [10, 2]), ("up", torch.float16, [10, 2])],
        [("gate", torch.float16, [2, 10]), ("up", torch.float16, [10, 2])],
        [("gate", torch.float16, [10, 2])],
        [],
    ],
)
def test_other_names_dtypes_or_shapes_than_were_sealed_are_refused(parts) -> None:
    flat = sealed(1)
    assert wrong_parts(flat, parts) == "bucket 1 of version 7 has other names, dtypes or shapes"
    as_an_engine_has_them = [(name, dtype, torch.Size(shape)) for name, dtype, shape in PARTS]
    assert wrong_parts(flat, as_an_engine_has_them) is None


def some_weights(count: int = 4096) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count)).bfloat16()


def signs_of_two(values: torch.Tensor) -> None:
    values[[3, 103]] *= -1


def signs_of_every_fourth(values: torch.Tensor) -> None:
    values[3::4] *= -1


def one_word_by_its_negative_elsewhere(values: torch.Tensor) -> None:
    values.view(torch.int32)[7] += 1 << 30
    values.view(torch.int32)[9] -= 1 << 30


def words_exchanged(values: torch.Tensor) -> None:
    values.view(torch.int64)[[3, 900]] = values.view(torch.int64)[[900, 3]]


def halves_exchanged(values: torch.Tensor) -> None:
    values.copy_(values.roll(len(values) // 2))


@pytest.mark.parametrize(
    "change",
    [
        signs_of_two,
        signs_of_every_fourth,
        one_word_by_its_negative_elsewhere,
        words_exchanged,
        halves_exchanged,
    ],
)
def test_sums_of_words_see_what_keeps_plain_sums(change) -> None:
    """Signs are the highest bits: two of them change a sum of 64-bit words by 2 to the 64th."""
    values = some_weights()
    before = word_sums(values.view(torch.uint8))
    change(values)
    assert not torch.equal(word_sums(values.view(torch.uint8)), before)


def test_sums_of_words_see_an_exchange_of_words_that_differ_in_their_sign_only() -> None:
    values = some_weights()
    values[800:804] = values[40:44]
    values[803] *= -1
    before = word_sums(values.view(torch.uint8))
    values[40:44], values[800:804] = values[800:804].clone(), values[40:44].clone()
    assert not torch.equal(word_sums(values.view(torch.uint8)), before)


@pytest.mark.parametrize("nbytes", [0, 1, 2, 3, 4, 5, 20, 1001])
def test_sums_of_words_are_those_of_whole_numbers(nbytes: int, monkeypatch) -> None:
    """In chunks, with a last word that is not whole, and from any address."""
    monkeypatch.setattr("nanoslime.sealed_bucket._CHUNK_WORDS", 7)
    generator = torch.Generator().manual_seed(nbytes)
    data = torch.randint(0, 256, (nbytes + 1,), dtype=torch.uint8, generator=generator)[1:]
    content = bytes(data.tolist())
    whole_bytes = nbytes // 4 * 4
    total = weighted = int.from_bytes(content[whole_bytes:], "little")
    for start in range(0, whole_bytes, 4):
        word = int.from_bytes(content[start : start + 4], "little", signed=True)
        total += word
        weighted += word * (2 * (start // 4) + 3)
    assert word_sums(data).tolist() == [total, weighted]


@pytest.mark.gpu
def test_a_gpu_sees_flipped_bits_and_swapped_words() -> None:
    flat = sealed(nbytes=10_001).cuda()
    seal(flat, Place(7, 0, 3), PARTS)
    assert broken_seal(flat, None) is None
    before = checksum(flat[HEADER_BYTES:])
    for position in (HEADER_BYTES, HEADER_BYTES + 5000, flat.numel() - 1):
        flat[position] ^= 1
        assert "not the bytes" in broken_seal(flat, None)
        flat[position] ^= 1
    words = flat[HEADER_BYTES : HEADER_BYTES + 10_000].view(torch.int64)
    words[[3, 900]] = words[[900, 3]]
    assert not torch.equal(checksum(flat[HEADER_BYTES:]), before)
