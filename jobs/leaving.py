"""The end of an attempt: what an agent and its guard do last, so that nothing is left on a node."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass

from jobs import ray_node
from jobs.cluster_env import ClusterEnv, remove_scratch
from nanoslime.run_dir import FAILED, Attempt

logger = logging.getLogger(__name__)


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
