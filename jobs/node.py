"""What runs on each node of a job: a guard that starts the node's agent and outlives it.

    python -m jobs.node RUN_DIR                               a SLURM task: the guard
    python -m jobs.node RUN_DIR --attempt N [--local-node I]  the agent (jobs/agent.py)

Guard and agent watch each other: orphans of the agent become children of its guard, and an
agent whose guard dies ends.
"""

import argparse
import logging
import os
import resource
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jobs.agent import Agent
from jobs.checkout import environment, module_command
from jobs.cluster_env import ClusterEnv, scratch_root, slurm_says
from jobs.leaving import clean_up, logged_if_unwritable
from jobs.requeue import follow_head
from jobs.submission import record_job
from nanoslime.config.load import read
from nanoslime.config.run import RunConfig
from nanoslime.doctor import Doctor, end_if_hung
from nanoslime.processes.child import ChildProcess
from nanoslime.processes.logs import set_level
from nanoslime.processes.signals import handled
from nanoslime.processes.tree import adopt_orphans, end_descendants
from nanoslime.run_dir import DONE, FAILED, STOPPED, Attempt, RunDir
from nanoslime.storage.shared_files import seen
from nanoslime.types import RunError

logger = logging.getLogger(__name__)

_POLL_S = 0.25
# Tasks that have left may still be on their way out, when our exit makes srun end all of them, or
# when we have the step ended.
_EXIT_DELAY_S = 1.5
# All agents have left so long after that of node 0.
_LEAVE_S = 60.0


@dataclass(frozen=True)
class NodeJob:
    """What a SLURM task runs: it guards an agent. Whether the job is requeued is decided after
    its step, by jobs/requeue.py.

    submitit pickles it. Its state is the path of the run directory; everything else is
    read there.
    """

    run_dir: str
    # For tests: the command to start in place of the trainer.
    driver: str = ""

    def __call__(self) -> int:
        """Returns DONE. Raises RunError where the attempt failed, or was stopped."""
        # Those that have come and are not yet handed on. submitit's own handlers, which requeue,
        # do not come in between.
        signals: list[signal.Signals] = []
        with handled(signals.append):
            return self._run(signals)

    def _run(self, signals: list[signal.Signals]) -> int:
        """Start the agent, hand signals on, wait for its end and clean up after it."""
        run = RunDir.open(Path(self.run_dir))
        config = read(run.config)
        env = _cluster_env(config)
        attempt = _find_attempt(run, env, config.cluster.ray_start_deadline_s)
        adopt_orphans()
        agent = start_agent(attempt, config, env, self.driver)
        doctor = Doctor(config.cluster, env.node_name, attempt)
        code = agent.poll()
        is_told = env.node_index > 0
        while code is None:
            end_if_hung(agent, doctor, attempt)
            # Before its first heartbeat it would ignore some signals, and be ended by others.
            if signals and attempt.heartbeats([env.node_index]):
                agent.send_signal(signals.pop(0))
            is_told = is_told or _tell_of_nodes(attempt)
            time.sleep(_POLL_S)
            code = agent.poll()
            if code == DONE and attempt.ended() is None:
                # It was taken for lost, as when its filesystem had stood still.
                agent = start_agent(attempt, config, env, self.driver)
                code = None
        with logged_if_unwritable():
            is_told = is_told or _tell_of_nodes(attempt)
            if code not in (DONE, STOPPED):
                attempt.end(FAILED, agent.exit_summary(), can_go_on=code < 0)
        end_descendants(grace_s=0.0)
        clean_up(attempt, env)
        if env.node_index == 0:
            with logged_if_unwritable():
                attempt.write_final_status()
        if code != DONE and _is_followed(attempt):
            _, reason = attempt.ended() or (FAILED, "unknown")
            logger.error("%s", reason)
            return DONE
        if env.node_index > 0 and seen(attempt.lost(0)):
            follow_head(attempt, code)
        if env.node_index == 0 and attempt.layout.can_lose_nodes:
            with logged_if_unwritable():
                _end_step(attempt, env)
        if code != DONE:
            time.sleep(_EXIT_DELAY_S)
            _, reason = attempt.ended() or (FAILED, "unknown")
            raise RunError(reason)
        return DONE


def _is_followed(attempt: Attempt) -> bool:
    """Whether SLURM has lost this life of the job, and started it anew.

    An exit code would make srun end the job's step, which is that of the new life by then: it
    has the same number.
    """
    with suppress(OSError):
        return not attempt.is_newest()
    return False


def _end_step(attempt: Attempt, env: ClusterEnv) -> None:
    """End the tasks of lost nodes, once the other nodes have left.

    The step of a run that can lose nodes ends with the last of its tasks, and srun waits for ever
    for one that is dead without SLURM's knowledge.
    """
    deadline = time.monotonic() + _LEAVE_S
    others = range(1, env.num_nodes)
    while True:
        beats = attempt.heartbeats(others)
        staying = [node for node in others if "left" not in beats.get(str(node), {})]
        are_lost = all(seen(attempt.lost(node)) for node in staying)
        if are_lost or time.monotonic() > deadline:
            break
        time.sleep(_POLL_S)
    # The step of a new life of the job has the same number.
    if staying and not _is_followed(attempt):
        names = ", ".join(env.node_names[node] for node in staying)
        logger.warning("the step is ended without %s", names)
        time.sleep(_EXIT_DELAY_S)
        # A container may lack it; srun then waits until SLURM has noticed the loss.
        slurm_says("scancel", f"{env.job_id}.{os.environ['SLURM_STEP_ID']}")


def _tell_of_nodes(attempt: Attempt) -> bool:
    """Put what the agents have found into the job's output; False where they are still looking."""
    with suppress(OSError):
        if seen(attempt.preflight):
            print(attempt.preflight.with_suffix(".txt").read_text(), flush=True)
            return True
    return False


def start_agent(attempt: Attempt, config: RunConfig, env: ClusterEnv, driver: str) -> ChildProcess:
    """A node's agent as a child, with the job's environment and this code.

    When we die it gets SIGTERM, so that it can end what it started itself.
    """
    place = [str(attempt.run.path), "--attempt", str(attempt.number)]
    command = [*module_command(sys.executable, "jobs.node"), *place]
    if driver:
        command += ["--driver", driver]
    if env.local:
        command += ["--local-node", str(env.node_index)]
    return ChildProcess(
        f"the agent of {env.node_name}",
        command,
        environment(**config.cluster.variables),
        attempt.log("agent", env.node_index),
        death_signal=signal.SIGTERM,
    )


def _cluster_env(config: RunConfig) -> ClusterEnv:
    cluster = config.cluster
    return ClusterEnv.from_slurm(os.environ, cluster.network_interface, cluster.scratch)


def _find_attempt(run: RunDir, env: ClusterEnv, deadline_s: float) -> Attempt:
    """The attempt of this life of the job: node 0 makes it, the others wait for it."""
    deadline = time.monotonic() + deadline_s
    attempt = run.find_attempt(env.attempt_key)
    # An earlier step of this life has had the one that has ended.
    while attempt is None or attempt.ended() is not None:
        if env.node_index == 0:
            # A batch script may also have been handed to sbatch by a person.
            record_job(run, env.job_id)
            return run.new_attempt(env.attempt_key, env.num_nodes)
        if time.monotonic() > deadline:
            raise RunError(
                f"waited {deadline_s:g} s for {env.node_names[0]} to begin an attempt "
                f"in {run.attempts}"
            )
        time.sleep(_POLL_S)
        attempt = run.find_attempt(env.attempt_key)
    return attempt


def main(argv: list[str] | None = None) -> int:
    """Guard an agent, or be one. The exit code: DONE or FAILED, of an agent also STOPPED."""
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
    layout = attempt.layout
    # The memory of a process with a model in it would fill the directory that it started in.
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, most))
    if arguments.local_node is None:
        env = _cluster_env(config)
    else:
        job_id, _, _ = attempt.key.rpartition("-")
        root = scratch_root(os.environ, config.cluster.scratch)
        place = (arguments.local_node, layout.num_nodes, job_id, layout.slots_per_node)
        env = ClusterEnv.for_local(*place, root)
    return Agent(attempt, config, layout, env, arguments.driver).run()


if __name__ == "__main__":
    sys.exit(main())
