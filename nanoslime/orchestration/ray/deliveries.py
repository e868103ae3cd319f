"""How the arrays of samples come from the rollout workers to the trainer ranks.

    plans of a DP rank -> one call of each worker that keeps some -> one object of Ray for each
                       -> fetched by every rank of that DP rank, past the driver

A sample is not an object of its own: one costs Ray about a millisecond of processor time, in
the worker, in the raylets of both nodes and in each process that has a reference.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from nanoslime.failures import summary
from nanoslime.types import KeptArrays, MachineFailure, SampleArrays

# Ray notices within a second that a worker is dead. One that hangs it would wait for without
# an end.
_FETCH_S = 300.0
# What has come is there at once.
_AT_HAND_S = 1.0


@dataclass(frozen=True, slots=True)
class Delivery:
    """Arrays that a rollout worker was asked for; `ref` becomes a list of SampleArrays, in the
    order of `kept`.
    """

    kept: list[KeptArrays]
    ref: ray.ObjectRef


def order(kept: Sequence[KeptArrays], workers: Sequence[Any]) -> list[Delivery]:
    """Asks the worker actors, which are in the order of their numbers; waits for none."""
    by_worker: dict[int, list[KeptArrays]] = {}
    for one in kept:
        by_worker.setdefault(one.worker, []).append(one)
    return [
        Delivery(own, workers[number].call_worker.remote("arrays", own))
        for number, own in by_worker.items()
    ]


def receive(deliveries: Sequence[Delivery]) -> dict[KeptArrays, SampleArrays]:
    """Waits for these deliveries. Raises RunError that names the worker of one that fails."""
    refs = [delivery.ref for delivery in deliveries]
    if refs:
        # They come to this node side by side.
        ray.wait(refs, num_returns=len(refs), timeout=_FETCH_S)
    found: dict[KeptArrays, SampleArrays] = {}
    for delivery in deliveries:
        try:
            arrays = ray.get(delivery.ref, timeout=_AT_HAND_S)
        except RayError as e:
            worker = delivery.kept[0].worker
            raise MachineFailure(
                f"the arrays of {len(delivery.kept)} samples by rollout worker {worker} cannot be "
                f"fetched, because its process has died or hangs, or its object store is gone: "
                f"{summary(e)}; what has become of it is in its log, and --resume goes on from "
                "the last checkpoint"
            ) from e
        found.update(zip(delivery.kept, arrays, strict=True))
    return found
