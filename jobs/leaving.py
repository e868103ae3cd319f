"""The end of an attempt: what an agent and its guard do last, so that nothing is left on a node."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass

from jobs import ray_node
from jobs.cluster_env import ClusterEnv, remove_scratch
from nanoslime.processes.child import ChildProcess
from nanoslime.run_dir import FAILED, Attempt
from nanoslime.types import MachineFailure, RunError

logger = logging.getLogger(__name__)
# A driver may end so long before `ray start` does where the raylet beside them has died: the one
# hears of it at once, and the other looks every second.
_RAY_ENDS_S = 5.0


@dataclass(eq=False)
class AttemptOver(Exception):
    """The attempt is over, so all waiting ends."""

    code: int
    reason: str
    _: KW_ONLY
    # Another agent has said so already.
    published: bool = False
    # It failed by a fault of a machine, so that another attempt may do better.
    can_go_on: bool = False

    @classmethod
    def by_another(cls, end: tuple[int, str]) -> "AttemptOver":
        """The end, code and reason, that another agent has published."""
        code, reason = end
        return cls(code, reason, published=True)


def failure_of_driver(
    attempt: Attempt, driver: ChildProcess, beside: Sequence[ChildProcess]
) -> RunError:
    """What the end of the driver, with an exit code that says that it failed, has to raise.

    It is a MachineFailure where another attempt may do better.

    beside: the other processes of its agent. Where a driver has not said why it failed and one of
    these ends too, that one is the cause: Ray ends the processes of a raylet that has died, with
    exit code 1.
    """
    status = attempt.run.status()
    # What the driver wrote down before it ended: its log may end with anything.
    if status.get("attempt") != attempt.number:
        status = {}
    told = status.get("error")
    is_lost = driver.returncode < 0 or status.get("can_go_on")
    deadline = time.monotonic() + _RAY_ENDS_S
    while not (told or is_lost) and time.monotonic() < deadline:
        for child in beside:
            if not child.alive():
                return MachineFailure(child.exit_summary())
        time.sleep(0.1)
    kind = MachineFailure if is_lost else RunError
    return kind(f"{told}; log: {driver.log}" if told else driver.exit_summary())


@contextmanager
def logged_if_unwritable() -> Iterator[None]:
    """What an agent says last may fail where its run directory does; it ends all the same."""
    try:
        yield
    except OSError as error:
        logger.error("not written: %s", error)


def clean_up(attempt: Attempt, env: ClusterEnv) -> None:
    """Remove what an attempt left on this node, where nothing of it runs any more.

    Ray's logs are kept where the attempt has failed.
    """
    scratch = env.scratch(attempt.path)
    with logged_if_unwritable():
        code, _ = attempt.ended() or (FAILED, "")
        if code == FAILED:
            ray_node.keep_logs(scratch, attempt.log("ray", env.node_index).with_suffix(""))
    remove_scratch(scratch)
    with logged_if_unwritable():
        attempt.leave(env.node_index)
