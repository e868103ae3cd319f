"""A rehearsal: a run's node agents as children of this process, one per simulated node."""

import math
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field

from jobs.cluster_env import ClusterEnv, scratch_root
from jobs.leaving import clean_up, logged_if_unwritable
from jobs.node import start_agent
from jobs.requeue import JobNow, num_vain_requeues, obstacle
from nanoslime.config.run import RunConfig
from nanoslime.layout import Layout
from nanoslime.processes.child import ChildProcess
from nanoslime.processes.signals import handled
from nanoslime.processes.tree import adopt_orphans, descendants, end_descendants
from nanoslime.run_dir import FAILED, STOPPED, Attempt, RunDir

_POLL_S = 0.2
# Agents may take this long to leave once the attempt has ended.
_LEAVE_S = 60.0


def run_local(config: RunConfig, layout: Layout, run: RunDir, driver: str = "") -> int:
    """Run an attempt on this machine and return its code; shows the driver's lines.

    One that a fault of a machine has ended goes on in a new attempt, as a job of SLURM does.

    Ctrl-C asks the driver to commit and stop; a second one ends it at once. The reason of
    an attempt that failed or was stopped goes to stderr.
    """
    others = descendants(os.getpid())
    adopt_orphans()
    job_id = f"l{os.getpid()}"
    root = scratch_root({**os.environ, **config.cluster.variables}, config.cluster.scratch)
    num_nodes = layout.num_nodes
    nodes = [ClusterEnv.for_local(i, num_nodes, job_id, root=root) for i in range(num_nodes)]
    signals: list[signal.Signals] = []
    why_not = ""
    with handled(signals.append):
        while not why_not:
            attempt = run.new_attempt(nodes[0].attempt_key)
            try:
                agents = [start_agent(attempt, config, env, driver) for env in nodes]
                _Supervisor(attempt, agents, signals).run()
            finally:
                end_descendants(others)
                for env in nodes:
                    clean_up(attempt, env)
            with logged_if_unwritable():
                attempt.write_final_status()
            code, reason = attempt.ended() or (FAILED, "the agents ended without saying why")
            if code:
                outcome = "stopped" if code == STOPPED else "failed"
                print(f"{outcome}: {reason}", file=sys.stderr, flush=True)
            num_vain = num_vain_requeues(run, job_id)
            why_not = obstacle(attempt, JobNow(), num_vain, config.cluster.max_requeues)
    return code


@dataclass(slots=True)
class _Supervisor:
    """Shows the driver's lines, hands signals on and reports a killed agent."""

    attempt: Attempt
    agents: list[ChildProcess]
    # Those that have come and are not yet handed on.
    signals: list[signal.Signals]
    _was_asked_to_stop: bool = False
    # Nodes whose agent has failed and is reported.
    _failed: set[int] = field(default_factory=set)
    _leave_by: float = math.inf

    def run(self) -> None:
        """Returns when all agents have ended, or one does not leave after the end."""
        # The driver appends to it once it runs.
        with self.attempt.log("driver", 0).open("ab+") as output:
            output.seek(0)
            any_alive = True
            while any_alive:
                any_alive = any(agent.alive() for agent in self.agents)
                shutil.copyfileobj(output, sys.stdout.buffer)
                sys.stdout.flush()
                self._hand_on_signals()
                self._report_failed_agents()
                if self.attempt.ended() is not None:
                    self._leave_by = min(self._leave_by, time.monotonic() + _LEAVE_S)
                if time.monotonic() > self._leave_by:
                    return
                if any_alive:
                    time.sleep(_POLL_S)

    def _hand_on_signals(self) -> None:
        """The first signal asks for a stop, and a second one ends the attempt at once.

        After SIGTERM the driver has as much time as SLURM gives.
        """
        while self.signals:
            number = self.signals.pop(0)
            if number == signal.SIGTERM:
                for agent in self.agents:
                    agent.send_signal(signal.SIGTERM)
            elif self._was_asked_to_stop:
                asked = self.attempt.final_stop()
                reason = f"{asked}; the driver did not commit in time and was ended"
                self.attempt.end(STOPPED, reason)
            else:
                reason = "Ctrl-C" if number == signal.SIGINT else number.name
                self.attempt.request_stop(reason)
                message = "stopping after this step; once more ends it at once"
                print(message, file=sys.stderr, flush=True)
                self._was_asked_to_stop = True

    def _report_failed_agents(self) -> None:
        for node, agent in enumerate(self.agents):
            code = agent.poll()
            if code and node not in self._failed:
                self._failed.add(node)
                self.attempt.end(FAILED, agent.exit_summary(), can_go_on=code < 0)
                self.attempt.leave(node)
