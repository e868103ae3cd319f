"""What runs on each node of a job: a guard that starts the node's agent and outlives it.

    python -m jobs.node RUN_DIR                               a SLURM task: the guard
    python -m jobs.node RUN_DIR --attempt N [--local-node I]  the agent (jobs/agent.py)

Guard and agent watch each other: orphans of the agent become children of its guard, and an
agent whose guard dies ends.
"""

import argparse
import logging
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from jobs.agent import Agent, logged_if_unwritable
from jobs.checkout import environment
from jobs.cluster_env import ClusterEnv, remove_scratch
from jobs.signals import WARNINGS, handled
from nanoslime.config.load import read
from nanoslime.config.run import RunConfig
from nanoslime.layout import Layout
from nanoslime.processes.child import ChildProcess
from nanoslime.processes.logs import set_level
from nanoslime.processes.tree import adopt_orphans, end_descendants
from nanoslime.run_dir import DONE, FAILED, STOPPED, Attempt, RunDir
from nanoslime.types import RunError

logger = logging.getLogger(__name__)

_POLL_S = 0.25
# Our exit makes srun end the other tasks, which have left but may still be on their way
# out.
_EXIT_DELAY_S = 1.5


@dataclass(frozen=True)
class NodeJob:
    """What a SLURM task runs: it guards an agent, and asks for a requeue.

    submitit pickles it. Its state is the path of the run directory; everything else is
    read there.
    """

    run_dir: str
    # For tests: the command to start in place of the trainer.
    driver: str = ""

    def __call__(self) -> int:
        """Returns DONE, or STOPPED (75) where the job shall be requeued.

        Raises RunError where the attempt failed.
        """
        run = RunDir.open(Path(self.run_dir))
        config = read(run.config)
        env = ClusterEnv.from_slurm(os.environ, config.cluster.network_interface)
        under_submitit = callable(signal.getsignal(signal.SIGUSR2))
        attempt = _find_attempt(run, env, config.cluster.ray_start_deadline_s)
        code = self._guard(attempt, config, env)
        if not under_submitit:
            # A SIGTERM that comes now must not replace the exit code.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if code == FAILED:
            _, reason = attempt.ended() or (FAILED, "unknown")
            raise RunError(reason)
        if code != STOPPED or not attempt.requeue_wanted():
            return DONE
        if env.restart_count >= config.cluster.max_requeues:
            raise RunError(
                "stopped, and not requeued: "
                f"cluster.max_requeues={config.cluster.max_requeues} is reached"
            )
        if under_submitit and env.node_index == 0:
            # submitit's handler calls checkpoint() and `scontrol requeue`, and ends the
            # process.
            signal.raise_signal(signal.SIGUSR2)
        return STOPPED

    def _guard(self, attempt: Attempt, config: RunConfig, env: ClusterEnv) -> int:
        """Start the agent, hand signals on, wait for its end and clean up after it."""
        adopt_orphans()
        agent = start_agent(attempt, config, env, self.driver)
        with handled(agent.send_signal):
            code = agent.poll()
            while code is None:
                time.sleep(_POLL_S)
                code = agent.poll()
            with logged_if_unwritable():
                if code not in (DONE, STOPPED):
                    code = FAILED
                    attempt.end(FAILED, agent.exit_summary())
            end_descendants()
            remove_scratch(env.scratch(attempt.path))
            with logged_if_unwritable():
                attempt.leave(env.node_index)
        if code != DONE:
            time.sleep(_EXIT_DELAY_S)
        return code


def start_agent(attempt: Attempt, config: RunConfig, env: ClusterEnv, driver: str) -> ChildProcess:
    """A node's agent as a child, with the job's environment and this code.

    When we die it gets SIGTERM, so that it can end what it started itself.
    """
    command = [
        sys.executable,
        "-m",
        "jobs.node",
        str(attempt.run.path),
        "--attempt",
        str(attempt.number),
    ]
    if driver:
        command += ["--driver", driver]
    if env.local:
        command += ["--local-node", str(env.node_index)]
    return ChildProcess(
        f"the agent of {env.node_name}",
        command,
        environment(**config.cluster.env),
        attempt.log("agent", env.node_index),
        death_signal=signal.SIGTERM,
        ignored_signals=WARNINGS,
    )


def _find_attempt(run: RunDir, env: ClusterEnv, deadline_s: float) -> Attempt:
    """The attempt of this life of the job: node 0 makes it, the others wait for it."""
    deadline = time.monotonic() + deadline_s
    attempt = run.find_attempt(env.attempt_key)
    while attempt is None:
        if env.node_index == 0:
            return run.new_attempt(env.attempt_key)
        if time.monotonic() > deadline:
            raise RunError(
                f"waited {deadline_s:g} s for {env.node_names[0]} to begin an attempt "
                f"in {run.attempts}"
            )
        time.sleep(_POLL_S)
        attempt = run.find_attempt(env.attempt_key)
    return attempt


def main(argv: list[str] | None = None) -> int:
    """Guard an agent, or be one. The exit code: DONE, FAILED or STOPPED."""
    arguments = _parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        if arguments.attempt is None:
            return NodeJob(str(arguments.run_dir), arguments.driver)()
        return _run_agent(arguments)
    except RunError as error:
        logger.error("%s", error)
        return FAILED


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.node", description="The node agent of a run."
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument(
        "--attempt",
        type=int,
        help="be the agent itself; without it, find the attempt and guard one",
    )
    parser.add_argument(
        "--local-node", type=int, help="this node of a rehearsal, rather than SLURM's"
    )
    parser.add_argument(
        "--driver", default="", help="command to start in place of `python -m nanoslime.train`"
    )
    return parser.parse_args(argv)


def _run_agent(arguments: argparse.Namespace) -> int:
    run = RunDir.open(arguments.run_dir)
    attempt = run.attempt(arguments.attempt)
    config = read(run.config)
    set_level(config.log_level)
    layout = Layout.from_json(run.plan.read_text())
    if arguments.local_node is None:
        env = ClusterEnv.from_slurm(os.environ, config.cluster.network_interface)
    else:
        job_id, _, _ = attempt.key.rpartition("-")
        env = ClusterEnv.for_local(
            arguments.local_node, layout.num_nodes, job_id, layout.slots_per_node
        )
    return Agent(attempt, config, layout, env, arguments.driver).run()


if __name__ == "__main__":
    sys.exit(main())
