"""The soak sees what grows, and knows when to disturb."""

from argparse import Namespace
from collections.abc import Callable

import pytest

from tests.slurm import soak
from tests.slurm.soak import Sample
from tests.slurm.submitted import ROLES, role_of

NUM_SAMPLES = 80


def samples(
    rss_mib: Callable[[int], float], files: Callable[[int], int] = lambda i: 30
) -> list[Sample]:
    """Of an agent, one after the other."""
    return [
        Sample(float(i), 1, "agent", 7, 5 + i, rss_mib(i), files(i), 4) for i in range(NUM_SAMPLES)
    ]


def grown(found: list[Sample]) -> list[str]:
    return [one.quantity for one in soak.growths(found) if not one.is_flat]


def test_what_is_flat_passes_and_what_grows_by_six_percent_is_told():
    assert grown(samples(lambda i: 100.0 + i % 3)) == []
    assert grown(samples(lambda i: 100.0 + 8.0 * i / NUM_SAMPLES)) == ["rss_mib"]
    assert grown(samples(lambda i: 100.0, lambda i: 30 + i // 20)) == ["files"]
    assert grown(samples(lambda i: 100.0, lambda i: 30 + i // 40)) == []


def test_a_peak_and_a_cold_start_are_no_growth():
    assert grown(samples(lambda i: 500.0 if i in (70, 75) else 100.0)) == []
    cold = [sample._replace(steps=4) for sample in samples(lambda i: 1.0 + i)]
    assert soak.growths(cold) == []
    assert soak.growths(samples(lambda i: 1.0)[: 4 * soak.MIN_QUARTER - 1]) == []


def test_what_is_flat_in_each_attempt_and_grows_with_the_run_is_told():
    found = []
    for attempt in range(1, 9):
        own = samples(lambda i: 100.0, lambda i, attempt=attempt: 30 + attempt)
        found += [sample._replace(attempt=attempt, pid=attempt) for sample in own]
    in_attempts = soak.growths(found)
    assert all(one.is_flat for one in in_attempts)
    across = {one.quantity: one for one in soak.growths_across(in_attempts)}
    assert across["files"].quarters == (31.5, 33.5, 35.5, 37.5)
    assert [name for name, one in across.items() if not one.is_flat] == ["files"]


@pytest.mark.parametrize(("hours", "losses"), [(0.05, 1), (1.0, 1), (1.02, 2), (2.5, 3)])
def test_a_node_is_lost_in_each_hour(hours: float, losses: int):
    asked = Namespace(hours=hours, seed=3, preemptions_per_hour=4.0)
    events = soak.plan_events(asked)
    assert events == sorted(events) == soak.plan_events(asked)
    assert all(0 < event.after_s < hours * 3600 for event in events)
    lost = [int(event.after_s // 3600) for event in events if event.what == "lose a node"]
    assert lost == list(range(losses))
    assert len(events) - losses == max(1, round(4 * hours))


def test_each_process_of_a_run_has_its_role():
    commands = {
        "guard": "/venv/bin/python -m jobs.node /runs/a",
        "agent": "/venv/bin/python -m jobs.node /runs/a --attempt 2",
        "driver": "/venv/bin/python -m nanoslime.train --run /runs/a --attempt 2",
        "srun": "srun --unbuffered /venv/bin/python -m jobs.node /runs/a",
        "ray start": "/venv/bin/python /venv/bin/ray start --block --head",
        "raylet": "/site/ray/core/src/ray/raylet/raylet --raylet_socket_name=a /gcs_server ",
        "gcs": "/site/ray/core/src/ray/gcs/gcs_server --log_dir=/tmp/ray",
        "trainer": "ray::RankActor.call",
        "sglang": "/venv/bin/python -m sglang.launch_server --port 1",
        "other": "sleep 1",
    }
    assert {role: role_of(command) for role, command in commands.items()} == {
        role: role for role in commands
    }
    assert commands.keys() - {"other"} <= ROLES.keys()
