"""The header of a bucket of weights, which proves it; trainers and engines know it.

    header (int64 [8]) | tensor | tensor | ...

The engine's plug-in takes the header off and refuses a bucket that is not the next one of its
version, whose bytes are not those that were sent, or whose tensors are said to be others.
"""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace

import torch
import xxhash
from torch import Tensor

HEADER = "nanoslime.header"
HEADER_WORDS = 8
HEADER_BYTES = 8 * HEADER_WORDS
# Stands after the name of a tensor that is larger than a bucket, as long as further rows of it
# follow under the same name.
MORE = "..."
# What is said of a tensor: its name, dtype and shape.
Part = tuple[str, torch.dtype, Sequence[int]]
# Words that are summed at a time, so that the products need little memory.
_CHUNK_WORDS = 4 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """A bucket's place in an update."""

    version: int
    number: int
    num_buckets: int
    # The engine has this version already: what it loads now must change nothing.
    compares: bool = False


def seal(flat: Tensor, place: Place, parts: Iterable[Part]) -> None:
    """Writes the header, once everything after it is there; nothing waits for the device."""
    header = flat[:HEADER_BYTES].view(torch.int64)
    for word, value in zip(header, (*astuple(place), flat.numel()), strict=False):
        word.fill_(value)
    header[5:7] = checksum(flat[HEADER_BYTES:])
    header[7].fill_(_checksum_of(parts))


def broken_seal(flat: Tensor, last: Place | None) -> str | None:
    """What is wrong with a bucket that comes after `last`; None where nothing is."""
    if flat.dtype != torch.uint8 or flat.numel() < HEADER_BYTES:
        return f"{flat.numel()} elements of {flat.dtype} hold no header"
    *_, num_bytes, first, second, _ = flat[:HEADER_BYTES].view(torch.int64).tolist()
    place = place_of(flat)
    expected = 0 if last is None else last.number + 1
    if num_bytes != flat.numel():
        return f"{flat.numel()} bytes came of a bucket of {num_bytes}"
    if last is not None and replace(place, number=last.number) != last:
        return f"a bucket of another update, {place}, came after {last}"
    if place.number != expected:
        return f"bucket {place.number} of version {place.version} came where {expected} was next"
    if checksum(flat[HEADER_BYTES:]).tolist() != [first, second]:
        return f"bucket {place.number} of version {place.version} has not the bytes that were sent"
    return None


def wrong_parts(flat: Tensor, parts: Iterable[Part]) -> str | None:
    """Whether these are the parts that were sealed: two of one shape that have each other's
    names, or a dtype of the same size, would be loaded otherwise."""
    if flat[:HEADER_BYTES].view(torch.int64)[7] == _checksum_of(parts):
        return None
    place = place_of(flat)
    return f"bucket {place.number} of version {place.version} has other names, dtypes or shapes"


def place_of(flat: Tensor) -> Place:
    """What the header says."""
    version, number, num_buckets, compares = flat[:32].view(torch.int64).tolist()
    return Place(version, number, num_buckets, bool(compares))


def checksum(data: Tensor) -> Tensor:
    """int64 [2] on the device of `data`, uint8 [n]: XXH3-128 on a CPU, elsewhere `word_sums`."""
    if data.device.type != "cpu":
        return word_sums(data)
    digest = xxhash.xxh3_128_digest(memoryview(data.numpy()))
    return torch.frombuffer(bytearray(digest), dtype=torch.int64)


def word_sums(data: Tensor) -> Tensor:
    """int64 [2]: the sum of the 32-bit words of uint8 [n], and their sum weighted by odd numbers
    that grow with the position, as Fletcher's checksum has it.

    In up to 4 GiB every change of one word or of two is seen, whatever their bits, and every
    exchange of two words: what it adds to the sums stays below 2 to the power of 64.
    """
    if data.storage_offset() % 4:
        data = data.clone()
    num_words = data.numel() // 4
    rest = data.new_zeros(4)
    rest[: data.numel() % 4] = data[num_words * 4 :]
    total = rest.view(torch.int32)[0].long()
    weighted = total.clone()
    words = data[: num_words * 4].view(torch.int32)
    for start in range(0, num_words, _CHUNK_WORDS):
        chunk = words[start : start + _CHUNK_WORDS].long()
        positions = torch.arange(start, start + chunk.numel(), device=data.device)
        total = total + chunk.sum()
        weighted = weighted + (chunk * (2 * positions + 3)).sum()
    return torch.stack([total, weighted])


def _checksum_of(parts: Iterable[Part]) -> int:
    text = "\n".join(f"{name} {dtype} {list(shape)}" for name, dtype, shape in parts)
    return int.from_bytes(xxhash.xxh3_64_digest(text.encode()), signed=True)
