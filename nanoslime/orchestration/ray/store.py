"""The arrays of samples in Ray's object store: one object for each sample."""

from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from nanoslime.types import RunError, SampleArrays


class RayStore:
    """An ArrayStore. An object lasts as long as somebody has a reference to it and the process
    that put it there lives. Arrays that stand in for their own reference are left as they are.
    """

    def put(self, arrays: SampleArrays) -> Any:
        return ray.put(arrays)

    def get(self, references: Sequence[Any]) -> list[SampleArrays]:
        stored = [ref for ref in references if not isinstance(ref, SampleArrays)]
        try:
            fetched = iter(ray.get(stored))
        except RayError as e:
            raise RunError(
                "the arrays of samples cannot be fetched, because the rollout worker that made "
                f"them has died or its object store is gone: {type(e).__name__}"
            ) from e
        return [ref if isinstance(ref, SampleArrays) else next(fetched) for ref in references]
