"""The arrays of samples in Ray's object store: one object for each sample."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayError

from nanoslime.types import RunError, SampleArrays

# Ray notices within a second that the process is dead which has put an object there. One that
# hangs it would wait for without an end.
_FETCH_S = 300.0


@dataclass(frozen=True, slots=True)
class Stored:
    """A reference to the arrays of the sample that errors call by `name`."""

    ref: ray.ObjectRef
    name: str


class RayStore:
    """An ArrayStore. An object lasts as long as somebody has a reference to it and the process
    that put it there lives. Arrays that stand in for their own reference are left as they are.
    """

    def put(self, arrays: SampleArrays, name: str) -> Stored:
        return Stored(ray.put(arrays), name)

    def get(self, references: Sequence[Any]) -> list[SampleArrays]:
        stored = [one for one in references if isinstance(one, Stored)]
        try:
            fetched = iter(ray.get([one.ref for one in stored], timeout=_FETCH_S))
        except RayError as e:
            raise RunError(
                f"the arrays of {_missing(stored, e)} cannot be fetched, because its process has "
                f"died or hangs, or its object store is gone: {type(e).__name__}; what has become "
                "of it is in its log, and --resume goes on from the last checkpoint"
            ) from e
        return [next(fetched) if isinstance(one, Stored) else one for one in references]


def _missing(stored: Sequence[Stored], error: RayError) -> str:
    """The name of the first sample that `error` is about."""
    if isinstance(error, ObjectLostError):
        is_missing = {one.ref for one in stored if one.ref.hex() == error.object_ref_hex}
    elif isinstance(error, GetTimeoutError):
        refs = [one.ref for one in stored]
        _, late = ray.wait(refs, num_returns=len(refs), timeout=0)
        is_missing = set(late)
    else:
        is_missing = set()
    return next((one.name for one in stored if one.ref in is_missing), "samples")
