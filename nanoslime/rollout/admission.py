"""Which prompts are sampled when, and which groups a rollout takes, so that no token that is
trained on is older than the bound.

It is state without I/O, threads or a clock. With `batch` groups a rollout, weights that were
trained on `version` rollouts, and a bound of k = max_staleness versions:

    admit   a prompt is admitted while fewer than (version + k + 1 - num_taken) * batch groups are
            outstanding: admitted, and neither taken nor replaced
    take    the rollout that trains version v takes `batch` finished groups. A group whose
            oldest token is of version w is due at v = w + k

Groups that are due need not be in the order in which they finish. For a take to come in which
every due group fits, the groups left behind must satisfy, for all j >= 1,

    |{due at v + j or before}| <= j * batch

which is the condition of earliest-deadline-first scheduling. The next admissions keep it, since
by then at most (k + 1) * batch groups are outstanding. So a take chooses the finished groups
with the oldest tokens, and waits where running ones are needed for the condition. With k = 0
it takes all that was admitted.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

Overdue = Literal["wait", "regenerate", "drop"]


@dataclass(frozen=True, slots=True)
class Limits:
    batch: int  # groups of a rollout
    max_staleness: int
    num_rollouts: int  # of the run: nothing is sampled for more
    # Groups that may be replaced for one rollout, because no filter lets them through.
    max_replaced: int = 0
    overdue: Overdue = "wait"


@dataclass(slots=True)
class Outstanding:
    """A group that was admitted and has not been taken."""

    oldest: int  # none of its tokens is, or will be, of an older version
    is_finished: bool = False


@dataclass(frozen=True, slots=True)
class Cancelled:
    """A group that will not be taken; `again` is the new group of its prompt, if any."""

    group_id: int
    again: int | None


@dataclass(frozen=True, slots=True)
class Taken:
    """The groups of a rollout."""

    # By number. Those that were replaced since the take before are among them.
    group_ids: list[int]
    # How many groups were dropped or sampled again since the take before, by reason.
    counts: Counter[str]


@dataclass(slots=True)
class Admission:
    limits: Limits
    # Rollouts that the weights of the engines were trained on.
    version: int = 0
    num_taken: int = 0
    next_group_id: int = 0
    groups: dict[int, Outstanding] = field(default_factory=dict)
    # Since the last take: groups that were replaced, which go with the next one for the record,
    # and how many were dropped or sampled again, by reason.
    replaced: list[int] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def room(self) -> int:
        """How many prompts may be admitted now."""
        last = min(self.version + self.limits.max_staleness + 1, self.limits.num_rollouts)
        return max((last - self.num_taken) * self.limits.batch - len(self.groups), 0)

    def admit(self) -> int:
        """Admits one prompt; returns the id of its group."""
        group_id = self.next_group_id
        self.next_group_id += 1
        self.groups[group_id] = Outstanding(self.version)
        return group_id

    def set_version(self, version: int) -> list[Cancelled]:
        """The engines have the weights of `version`.

        Returns the groups that are beyond the bound, which are cancelled. There are none
        unless the run was resumed with narrower limits.
        """
        self.version = version
        bound = version - self.limits.max_staleness
        expired = [number for number, group in self.groups.items() if group.oldest < bound]
        return [self._cancel(group_id, "beyond_bound") for group_id in expired]

    def finish(
        self, group_id: int, oldest: int | None, *, is_kept: bool, has_failed: bool = False
    ) -> bool:
        """A group was sampled; returns whether it is still wanted.

        `oldest` is the version of its oldest token, None without any. A group that the
        filters do not keep is replaced by a further prompt, which `room` then allows,
        until the limit of the rollout is reached. None of its samples could be made where it
        `has_failed`: such groups come early, and would fill a rollout that samples ahead, so
        one batch more of them may be replaced.
        """
        group = self.groups.get(group_id)
        if group is None:
            return group_id in self.replaced
        group.is_finished = True
        if oldest is not None:
            group.oldest = oldest
        max_replaced = self.limits.max_replaced
        if has_failed and self.limits.max_staleness > 0:
            max_replaced += self.limits.batch
        if not is_kept and len(self.replaced) < max_replaced:
            del self.groups[group_id]
            self.replaced.append(group_id)
        return True

    def lose(self, group_id: int) -> bool:
        """The samples of a group are gone; returns whether they are to be made again."""
        if group_id not in self.groups:
            return False
        self.groups[group_id] = Outstanding(self.version)
        return True

    def take(self) -> Taken | None:
        """The next rollout's groups; None while it has to wait."""
        finished = [number for number, group in self.groups.items() if group.is_finished]
        if len(finished) < self.limits.batch or self._needed():
            return None
        finished.sort(key=lambda number: (self.groups[number].oldest, number))
        chosen = finished[: self.limits.batch]
        for group_id in chosen:
            del self.groups[group_id]
        taken = Taken(sorted(chosen + self.replaced), self.counts)
        self.num_taken += 1
        self.replaced = []
        self.counts = Counter()
        return taken

    def cancel_overdue(self) -> list[Cancelled]:
        """Cancels the running groups that the next take would have to wait for, as far as
        they began under older weights; none where the limits say to wait."""
        cancelled: list[Cancelled] = []
        if self.limits.overdue == "wait":
            return cancelled
        while needed := self._needed():
            cancelled += [self._cancel(group_id, "overdue") for group_id in needed]
        return cancelled

    def _needed(self) -> list[int]:
        """Running groups, the last admitted first, without which a take would leave more
        due groups behind than the takes after it have room for."""
        batch = self.limits.batch
        first_due = self.version - self.limits.max_staleness
        for ahead in range(self.limits.max_staleness):
            due = [n for n, group in self.groups.items() if group.oldest <= first_due + ahead]
            running = [number for number in due if not self.groups[number].is_finished]
            num_needed = min(len(due) - ahead * batch, batch)
            num_missing = num_needed - (len(due) - len(running))
            if num_missing > 0:
                return sorted(running, reverse=True)[:num_missing]
        return []

    def _cancel(self, group_id: int, reason: str) -> Cancelled:
        """Takes a group out; its prompt is admitted again in its place, unless overdue ones
        are dropped."""
        del self.groups[group_id]
        if self.limits.overdue == "drop":
            self.counts[f"dropped_{reason}"] += 1
            return Cancelled(group_id, None)
        self.counts[f"regenerated_{reason}"] += 1
        return Cancelled(group_id, self.admit())

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs; which groups have finished, their worker knows."""
        return {
            "num_taken": self.num_taken,
            "next_group_id": self.next_group_id,
            "oldest": {str(number): group.oldest for number, group in self.groups.items()},
            "replaced": list(self.replaced),
            "counts": dict(self.counts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with the groups of `state`; all of them count as running."""
        self.num_taken = state["num_taken"]
        self.next_group_id = state["next_group_id"]
        self.groups = {int(number): Outstanding(v) for number, v in state["oldest"].items()}
        self.replaced = list(state["replaced"])
        self.counts = Counter(state["counts"])
