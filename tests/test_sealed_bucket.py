"""Nothing but the next bucket of the same version, with all its bytes, has an unbroken seal."""

import pytest
import torch

from nanoslime.sealed_bucket import HEADER_BYTES, Place, broken_seal, checksum, place_of, seal


def sealed(number: int = 0, version: int = 7, num_buckets: int = 3, nbytes: int = 100):
    generator = torch.Generator().manual_seed(nbytes)
    body = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)
    flat = torch.cat([torch.zeros(HEADER_BYTES, dtype=torch.uint8), body])
    seal(flat, Place(version, number, num_buckets))
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
        (sealed(1)[:-1], "155 bytes came of a bucket of 156"),
    ],
)
def test_another_bucket_than_the_next_is_refused(next_one: torch.Tensor, problem: str) -> None:
    first = sealed(0)
    assert problem in broken_seal(next_one, place_of(first))
    assert broken_seal(sealed(1), place_of(first)) is None


@pytest.mark.gpu
def test_a_gpu_sees_flipped_bits_and_swapped_words() -> None:
    flat = sealed(nbytes=10_001).cuda()
    seal(flat, Place(7, 0, 3))
    assert broken_seal(flat, None) is None
    before = checksum(flat[HEADER_BYTES:])
    for position in (HEADER_BYTES, HEADER_BYTES + 5000, flat.numel() - 1):
        flat[position] ^= 1
        assert "not the bytes" in broken_seal(flat, None)
        flat[position] ^= 1
    words = flat[HEADER_BYTES : HEADER_BYTES + 10_000].view(torch.int64)
    words[[3, 900]] = words[[900, 3]]
    assert not torch.equal(checksum(flat[HEADER_BYTES:]), before)
