"""What the driver and its rollout workers tell each other: tasks there, news back.

A worker runs the groups that it is given and keeps their samples. The driver sees reports,
which hold numbers and where the arrays are, and decides which groups a rollout has.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from nanoslime.config import RolloutConfig, RunConfig
from nanoslime.types import Engine, GroupReport, MachineFailure, Prompt

Purpose = Literal["train", "eval"]


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """Which rollout worker of a run this is."""

    config: RunConfig
    model_dir: Path
    # Where rollouts are recorded.
    rollouts: Path
    index: int = 0
    num_workers: int = 1
    # Engines that usually serve it.
    num_engines: int = 1


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the samples of a group are drawn; the names are RolloutConfig's."""

    n_samples_per_prompt: int
    max_new_tokens: int
    temperature: float
    top_p: float = 1.0
    top_k: int = -1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: RolloutConfig) -> "Sampling":
        values = {field.name: getattr(config, field.name) for field in fields(cls)}
        texts = tuple(config.stop)
        return cls(**values | {"stop": texts, "stop_token_ids": tuple(config.stop_token_ids)})


@dataclass(frozen=True, slots=True)
class GroupTask:
    """One prompt to sample. `group_id` is the group's own in the whole run."""

    group_id: int
    prompt: Prompt
    sampling: Sampling
    # 63 bits; an engine that honours seeds draws sample i from (seed, i).
    seed: int
    # A name of the reward table, or "package.module:function".
    reward: str
    purpose: Purpose = "train"


@dataclass(frozen=True, slots=True)
class FinishedGroup:
    """A group that training is done with; `advantages` are in the order of its samples."""

    group_id: int
    advantages: list[float | None]


@dataclass(frozen=True, slots=True)
class RestoredGroup:
    """A group that a worker has read from a checkpoint.

    `report` is None where the group is still being sampled. `task` is what it was started with.
    """

    task: GroupTask
    report: GroupReport | None


@dataclass(frozen=True, slots=True)
class WorkerNews:
    """What has happened on a worker since it was asked the last time."""

    groups: list[GroupReport] = field(default_factory=list)
    # Engines that failed their health checks, by name, with the cause.
    lost: dict[str, str] = field(default_factory=dict)


class WorkerGone(MachineFailure):
    """A worker is lost, alone or with its node, with its engines, and with all that it held."""

    def __init__(self, cause: str, engines: Sequence[str]) -> None:
        super().__init__(cause)
        self.engines = engines


def seed_of(*words: int) -> int:
    """A seed of 63 bits of its own for these numbers, of which 32 bits count each."""
    bits = np.random.SeedSequence([word % 2**32 for word in words])
    return int(bits.generate_state(1, np.uint64)[0] >> 1)


class Worker(Protocol):
    """One rollout worker as the driver sees it, in this process or as an actor of Ray.

    Calls without an answer return at once and are obeyed in their order, before a later `save`,
    `load` or `metrics`. The others raise RunError that names the worker where it hangs or fails,
    and `poll` also where it could not obey. They raise WorkerGone from its loss on until it is
    there again, with nothing of what it held; what it is told until then is lost.
    """

    name: str

    def start(self, tasks: Sequence[GroupTask]) -> None:
        """Starts to sample and score these groups; each is reported once by `poll`."""

    def poll(self, timeout_s: float) -> WorkerNews:
        """Waits for news, `timeout_s` at most; there may be none."""

    def cancel(self, group_ids: Sequence[int]) -> None:
        """Ends these groups and forgets them, running or finished; they are not reported."""

    def finish_step(self, step: int, groups: Sequence[FinishedGroup]) -> None:
        """Records these groups as those of rollout `step`, in the background, and lets those of
        the step before go."""

    def set_engines(self, engines: Sequence[Engine]) -> None:
        """These engines serve from now on. A request on one that is no longer among them
        goes on elsewhere, from the tokens that it has."""

    def drain(self) -> None:
        """A weight sync begins. Until the next `set_engines` no request is sent to an engine,
        and none of them is judged; what runs is the engines' to keep or to end."""

    def save(self, path: Path) -> None:
        """Writes the training groups that it holds, partial samples included, to `path`.

        Running requests are interrupted for it, and go on.
        """

    def load(self, path: Path) -> list[RestoredGroup]:
        """Reads what `save` wrote, and goes on with it once there are engines."""

    def metrics(self) -> dict[str, float]:
        """What it has counted since it was asked the last time."""
