"""Looks at one node of an attempt, and on node 0 judges all of them.

    python -m tools.preflight.command RUN_DIR ATTEMPT ENV
        ENV is the agent's ClusterEnv as JSON

The agent of each node starts it, and starts Ray when it has ended well. Its exit code is 0 where
there is a verdict, which is in preflight.json; else the last line that it prints says why not.
"""

import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

from jobs.cluster_env import ClusterEnv
from nanoslime.config.load import read
from nanoslime.processes.logs import FORMAT
from nanoslime.run_dir import RunDir
from nanoslime.types import MachineFailure, RunError
from tools.preflight.node import Place
from tools.preflight.rounds import Preflight

_POLL_S = 0.1
_CANARY_DEADLINE_S = 30.0
_LINKS_DEADLINE_S = 120.0


def look_at_nodes(preflight: Preflight, place: Place) -> None:
    """Take part until there is a verdict. MachineFailure where a node is missing."""
    # Each check has its own deadline.
    preflight.examine()
    deadlines = place.cluster
    if place.env.node_index:
        # Node 0 ends the attempt where it misses a node.
        patience_s = deadlines.ray_start_deadline_s + deadlines.node_join_deadline_s
        if not wait_until(preflight.take_part, patience_s):
            raise MachineFailure(
                f"waited {patience_s:g} s for {place.env.node_names[0]} to look at all nodes; "
                f"see {preflight.log_of(0)}"
            )
        return
    if not wait_until(lambda: not preflight.missing(), deadlines.node_join_deadline_s):
        missing = ", ".join(preflight.missing())
        raise MachineFailure(f"did not join within {deadlines.node_join_deadline_s:g} s: {missing}")
    preflight.ask()
    wait_until(preflight.have_all_answered, _CANARY_DEADLINE_S)
    verdict = preflight.judge()
    if preflight.wants_links() and not verdict.cause:
        preflight.ask_for_links()
        wait_until(preflight.are_links_measured, _LINKS_DEADLINE_S)
        verdict = preflight.judge()
    preflight.publish(verdict)


def wait_until(condition: Callable[[], bool], deadline_s: float) -> bool:
    """Whether `condition()` holds before the deadline.

    One that cannot be read this time does not hold yet.
    """
    deadline = time.monotonic() + deadline_s
    while time.monotonic() <= deadline:
        try:
            if condition():
                return True
        except OSError as error:
            logging.warning("%s", error)
        time.sleep(_POLL_S)
    return False


def main(argv: list[str]) -> int:
    path, number, env = argv
    logging.basicConfig(level=logging.INFO, format=FORMAT)
    run = RunDir.open(Path(path))
    attempt = run.attempt(int(number))
    facts = json.loads(env)
    names = tuple(facts["node_names"])
    own = ClusterEnv(**facts | {"node_names": names, "scratch_root": Path(facts["scratch_root"])})
    place = Place(own, attempt.layout, read(run.config).cluster, attempt.path)
    try:
        look_at_nodes(Preflight(attempt, place), place)
    except (RunError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
