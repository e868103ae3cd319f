"""The bound on staleness under load: whatever the order in which groups finish, fail, are
filtered, and the run is resumed.
"""

import json
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from nanoslime.rollout.admission import Admission, Limits, Taken


def made(**changes: Any) -> Limits:
    return replace(Limits(batch=1, max_staleness=0, num_rollouts=1000), **changes)


@dataclass
class Simulated:
    """Engines with random speeds under an Admission, and a trainer that takes from it."""

    limits: Limits
    rng: random.Random
    admission: Admission = field(init=False)
    num_prompts: int = 0
    prompt_of: dict[int, int] = field(default_factory=dict)
    # Groups that run: the version at their first token (None: queued), and steps to their end.
    running: dict[int, list[int | None]] = field(default_factory=dict)
    # And those that have: also whether the filters leave anything.
    finished: dict[int, tuple[int | None, bool]] = field(default_factory=dict)
    trained: list[list[int]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.admission = Admission(self.limits)

    def feed(self) -> None:
        for _ in range(self.admission.room()):
            self.start(self.admission.admit(), self.num_prompts)
            self.num_prompts += 1
        assert len(self.admission.groups) == len(set(self.admission.groups))

    def start(self, group_id: int, prompt: int) -> None:
        assert group_id not in self.prompt_of, "a group's number is its own"
        self.prompt_of[group_id] = prompt
        slow = self.rng.random() < 0.1
        steps = self.rng.randint(50, 400) if slow else self.rng.randint(1, 12)
        self.running[group_id] = [None, steps]

    def tick(self) -> None:
        """Every engine makes a step; some groups finish, some of them for a filter."""
        for group_id, (first, steps) in list(self.running.items()):
            if first is None and self.rng.random() < 0.7:
                first = self.admission.version
            self.running[group_id] = [first, steps - 1]
            if steps <= 1 and (first is not None or self.rng.random() < 0.1):
                del self.running[group_id]
                is_kept = first is not None and self.rng.random() < 0.8
                self.finished[group_id] = first, is_kept  # without any token: it failed
                failed = first is None
                assert self.admission.finish(group_id, first, is_kept=is_kept, has_failed=failed)
        self.feed()

    def cancel(self, cancelled) -> None:
        for gone in cancelled:
            self.running.pop(gone.group_id, None)
            self.finished.pop(gone.group_id, None)
            if gone.again is not None:
                self.start(gone.again, self.prompt_of[gone.group_id])
        self.feed()

    def take(self) -> Taken:
        for _ in range(5000):
            taken = self.admission.take()
            if taken is not None:
                self.feed()
                return taken
            self.cancel(self.admission.cancel_overdue())
            assert self.running, "nothing runs that a take could wait for"
            self.tick()
        raise AssertionError("a take waits for ever")

    def train(self, taken: Taken) -> None:
        version = self.admission.version
        for group_id in taken.group_ids:
            oldest, is_kept = self.finished.pop(group_id)
            if is_kept:
                assert version - self.limits.max_staleness <= oldest <= version
        self.trained.append([self.prompt_of[group_id] for group_id in taken.group_ids])
        self.counts += taken.counts
        for _ in range(self.rng.choice([0, 3, 40])):
            self.tick()
        self.cancel(self.admission.set_version(version + 1))

    def resume(self, limits: Limits) -> None:
        """A new process goes on from a checkpoint; the workers kept what they have."""
        state = json.loads(json.dumps(self.admission.state_dict()))
        self.limits = limits
        version = self.admission.version
        self.admission = Admission(limits)
        self.admission.load_state_dict(state)
        for group_id, (oldest, is_kept) in self.finished.items():
            assert self.admission.finish(group_id, oldest, is_kept=is_kept)
        self.cancel(self.admission.set_version(version))

    def check_prompts(self) -> None:
        """Every prompt was trained on, waits or is counted as dropped, and none twice."""
        trained = [prompt for prompts in self.trained for prompt in prompts]
        held = {*self.running, *self.finished}
        assert held == {*self.admission.groups, *self.admission.replaced}
        waiting = [self.prompt_of[group_id] for group_id in held]
        seen = Counter(trained + waiting)
        assert max(seen.values()) == 1
        counts = self.counts + self.admission.counts
        num_dropped = sum(n for reason, n in counts.items() if reason.startswith("dropped"))
        assert len(seen) + num_dropped == self.num_prompts


@pytest.mark.parametrize("overdue", ["wait", "regenerate", "drop"])
@pytest.mark.parametrize("max_staleness", range(5))
def test_no_trained_token_is_too_old_and_no_prompt_is_lost(max_staleness, overdue):
    """Under random loads, filters, failures and resumes: with the same limits."""
    for seed in range(20):
        rng = random.Random(f"{max_staleness} {overdue} {seed}")
        limits = made(
            batch=rng.choice([1, 2, 5]),
            max_staleness=max_staleness,
            max_replaced=rng.choice([0, 2, 7]),
            overdue=overdue,
        )
        run = Simulated(limits, rng)
        run.feed()
        for step in range(25):
            taken = run.take()
            most = limits.batch + limits.max_replaced
            if max_staleness > 0:
                most += limits.batch  # of groups that failed
            assert limits.batch <= len(taken.group_ids) <= most
            run.train(taken)
            assert len(run.admission.groups) <= (max_staleness + 1) * limits.batch
            if rng.random() < 0.2:
                run.resume(limits)
            run.check_prompts()
            assert run.admission.num_taken == step + 1
        if overdue == "wait":
            assert not run.counts


def test_a_run_resumed_with_other_limits_keeps_to_them():
    """A smaller bound or batch: what no longer fits is sampled again or dropped, and counted.
    Only of what the filters leave nothing may older tokens go on record.
    """
    reasons: Counter[str] = Counter()
    for seed in range(60):
        rng = random.Random(seed)
        run = Simulated(made(batch=4, max_staleness=4, max_replaced=rng.choice([0, 3])), rng)
        run.feed()
        for _ in range(12):
            run.train(run.take())
            if rng.random() < 0.4:
                limits = replace(
                    run.limits,
                    batch=rng.choice([1, 2, 4]),
                    max_staleness=rng.choice([0, 1, 2, 4]),
                    max_replaced=rng.choice([0, 3, 8]),
                    overdue=rng.choice(["wait", "regenerate", "drop"]),
                )
                run.resume(limits)
            run.check_prompts()
        reasons += run.counts
    assert reasons["regenerated_beyond_bound"] > 0 and reasons["dropped_beyond_bound"] > 0


def test_on_policy_a_rollout_is_what_was_admitted_for_it():
    """In the order of the prompts, whichever finishes first; each filtered group is replaced."""
    admission = Admission(made(batch=3, max_staleness=0, max_replaced=2))
    assert [admission.admit() for _ in range(admission.room())] == [0, 1, 2]
    assert admission.room() == 0
    admission.finish(2, 0, is_kept=True)
    admission.finish(0, 0, is_kept=False)
    assert admission.room() == 1 and admission.admit() == 3
    admission.finish(3, 0, is_kept=False)
    assert admission.room() == 1 and admission.admit() == 4
    admission.finish(4, 0, is_kept=False)
    assert admission.room() == 0, "two were replaced already"
    assert admission.take() is None
    admission.finish(1, 0, is_kept=True)
    taken = admission.take()
    assert taken is not None and taken.group_ids == [0, 1, 2, 3, 4]
    assert admission.room() == 0, "the next rollout waits for its weights"
    assert admission.set_version(1) == [] and admission.room() == 3


def test_groups_that_fail_at_once_do_not_fill_a_rollout_that_samples_ahead():
    """Every second prompt fails before any other group is there; one batch more is tried."""
    admission = Admission(made(batch=4, max_staleness=1))
    good = []
    while admission.room():
        group_id = admission.admit()
        if group_id % 2:
            admission.finish(group_id, None, is_kept=False, has_failed=True)
        else:
            good.append(group_id)
    assert len(admission.replaced) == 4
    assert admission.take() is None
    for group_id in good:
        admission.finish(group_id, 0, is_kept=True)
    taken = admission.take()
    assert taken is not None and len(set(taken.group_ids) & set(good)) >= 2

    hopeless = Admission(made(batch=4, max_staleness=1))
    for _ in range(3 * 4):
        hopeless.finish(hopeless.admit(), None, is_kept=False, has_failed=True)
    assert hopeless.room() == 0 and hopeless.take() is not None


def test_engines_run_ahead_by_the_bound():
    admission = Admission(made(batch=2, max_staleness=2))
    assert admission.room() == 6
    for _ in range(6):
        admission.finish(admission.admit(), 0, is_kept=True)
    taken = admission.take()
    assert taken is not None and taken.group_ids == [0, 1] and admission.room() == 0
    assert admission.set_version(1) == [] and admission.room() == 2


def slow_first_groups(overdue) -> Admission:
    """Groups 0 to 2 are of version 0, of which 0 runs on; then 3 and 4 of version 1 finish."""
    admission = Admission(made(batch=1, max_staleness=2, overdue=overdue))
    for _ in range(3):
        admission.admit()
    for group_id in (1, 2):
        admission.finish(group_id, 0, is_kept=True)
    for version in (1, 2):
        assert admission.take() is not None
        assert admission.set_version(version) == []
        admission.finish(admission.admit(), version, is_kept=True)
    return admission


def test_a_take_waits_for_what_is_due_though_other_groups_are_there():
    admission = slow_first_groups("wait")
    assert admission.take() is None and admission.cancel_overdue() == []
    admission.finish(0, 0, is_kept=True)
    taken = admission.take()
    assert taken is not None and taken.group_ids == [0]


def test_the_last_rollouts_admit_no_more_than_they_need():
    admission = Admission(made(batch=2, max_staleness=4, num_rollouts=3))
    assert admission.room() == 6
    for _ in range(6):
        admission.finish(admission.admit(), 0, is_kept=True)
    for version in (1, 2, 3):
        assert admission.take() is not None
        assert admission.set_version(version) == [] and admission.room() == 0


@pytest.mark.parametrize("overdue", ["regenerate", "drop"])
def test_what_is_overdue_is_cancelled_and_counted(overdue):
    admission = slow_first_groups(overdue)
    [cancelled] = admission.cancel_overdue()
    assert cancelled.group_id == 0 and cancelled.again == (5 if overdue == "regenerate" else None)
    taken = admission.take()
    assert taken is not None and taken.group_ids == [3]
    name = "regenerated" if overdue == "regenerate" else "dropped"
    assert taken.counts == {f"{name}_overdue": 1}
    assert admission.finish(0, 0, is_kept=True) is False, "its news come too late"


def test_a_take_waits_early_enough_for_slow_groups_of_one_version():
    """Two slow groups that are due at the same take would not both fit into it."""
    admission = Admission(made(batch=1, max_staleness=2))
    for _ in range(3):
        admission.admit()
    admission.finish(0, 0, is_kept=True)
    assert admission.take() is not None
    admission.set_version(1)
    admission.finish(admission.admit(), 1, is_kept=True)
    assert admission.take() is None, "1 and 2 are both due for version 2"
    admission.finish(1, 0, is_kept=True)
    taken = admission.take()
    assert taken is not None and taken.group_ids == [1]


def test_a_group_that_began_late_is_due_late():
    """Group 1 waited for an engine until there were weights of version 1; 2 did not."""
    admission = Admission(made(batch=1, max_staleness=2))
    for _ in range(3):
        admission.admit()
    admission.finish(0, 0, is_kept=True)
    assert admission.take() is not None
    admission.set_version(1)
    admission.finish(1, 1, is_kept=True)
    admission.finish(2, 0, is_kept=True)
    taken = admission.take()
    assert taken is not None and taken.group_ids == [2]
