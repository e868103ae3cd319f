"""The agent of one node: it starts Ray, on node 0 also the driver, and watches both.

    preflight -> model and environment on its disk -> Ray head | Ray worker -> all joined: driver
    -> watch -> end everything that was started

Agents meet in the attempt's directory:

    head.json           how to reach Ray
    nodes/<i>.json      a node has joined
    heartbeat/<i>.json  it lives, or has left
    lost/<i>.json       it is taken for lost
    stop.json           the driver must stop
    end.json            the attempt is over, and why

A node that has only engines may be lost: the run goes on without them. Where it lives all the same,
its agent sees that, ends what it has there, and its guard starts another one, which joins again.

The agent that sees the end first writes it; all others follow. A non-zero exit code comes last,
when the other agents have left, since SLURM then kills the step.
"""

import json
import logging
import os
import shlex
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from jobs import ray_node
from jobs.checkout import environment, module_command
from jobs.cluster_env import ClusterEnv, remove_scratch
from jobs.leaving import AttemptOver, clean_up, failure_of_driver, logged_if_unwritable
from jobs.staging import NodeStaging, kept_caches, wants_copy
from nanoslime.config.run import RunConfig
from nanoslime.doctor import Doctor, Finding, learned_s
from nanoslime.failures import is_of_machine, summary
from nanoslime.layout import Layout
from nanoslime.processes.child import ChildProcess
from nanoslime.processes.logs import last_line
from nanoslime.processes.phases import own_report, rest_of_training_s
from nanoslime.processes.ports import answers, hold_consecutive_ports
from nanoslime.processes.signals import WARNINGS, handled
from nanoslime.processes.tree import adopt_orphans, descendants, end_descendants
from nanoslime.run_dir import DONE, FAILED, STOPPED, Attempt
from nanoslime.storage.shared_files import publish_json, read_json, seen
from nanoslime.types import MachineFailure, RunError

logger = logging.getLogger(__name__)

_TICK_S = 0.25
_HEARTBEAT_S = 5.0
# So often while a task is late.
_HURRY_S = 1.0
# A node whose heartbeat stands still for this long is lost, or sooner where beats are regular.
_SILENCE_S = 90.0
_NUM_INTERVALS = 99
# Other agents may take this long to clean up.
_LEAVE_S = 30.0
# A driver that got SIGTERM may use this much of the time until SLURM kills the job.
_KILL_WAIT_SHARE = 0.6


class Agent:
    """One node's part of one attempt."""

    def __init__(
        self, attempt: Attempt, config: RunConfig, layout: Layout, env: ClusterEnv, driver: str
    ) -> None:
        """`driver` is started in place of `python -m nanoslime.train`, unless it is empty."""
        self._attempt = attempt
        self._config = config
        self._layout = layout
        self._env = env
        self._is_head = env.node_index == 0
        self._scratch = env.scratch(attempt.path)
        # Its death sends us SIGTERM.
        self._guard = os.getppid()
        self._driver_command = shlex.split(driver)
        self._venv: Path | None = None
        self._children: list[ChildProcess] = []
        self._driver: ChildProcess | None = None
        # Signals that have come and are not yet passed on.
        self._signals: list[signal.Signals] = []
        # When a driver that was told to stop is ended, on the monotonic clock.
        self._kill_at = float("inf")
        self._num_beats = 0
        self._next_beat_at = 0.0
        # Of each node the last count, and when it changed on our monotonic clock.
        self._last_beats: dict[str, tuple[int, float]] = {}
        self._beat_intervals: deque[float] = deque(maxlen=_NUM_INTERVALS)
        self._doctor = Doctor(config.cluster, env.node_name, attempt)
        self._findings: set[Finding] = set()

    def run(self) -> int:
        """Live through the attempt.

        Returns its code on node 0 and on the node that ended it, else 0.
        """
        adopt_orphans()
        with handled(self._signals.append):
            try:
                self._live()
            except AttemptOver as over:
                end = over
            except RunError as error:
                end = AttemptOver(FAILED, str(error), can_go_on=is_of_machine(error))
            except Exception as error:
                logger.exception("the agent of %s failed", self._env.node_name)
                reason = f"agent of {self._env.node_name}: {summary(error)}"
                end = AttemptOver(FAILED, reason, can_go_on=is_of_machine(error))
            return self._leave(end)

    def _live(self) -> None:
        """Everything up to the end of the attempt, which always comes as an exception."""
        self._attempt.lost(self._env.node_index).unlink(missing_ok=True)
        self._tick()
        self._make_sure_of_nodes()
        self._stage()
        if self._is_head:
            self._start_head()
        else:
            self._start_worker()
        self._join()
        if self._is_head:
            self._wait_for_nodes(self._joined_file(0).parent)
            self._start_driver()
        while True:
            self._tick()
            time.sleep(_TICK_S)

    def _make_sure_of_nodes(self) -> None:
        """Have this node looked at by a process, which on node 0 judges all of them; raises
        AttemptOver for unfit ones.

        A node that comes back is not looked at again.
        """
        if seen(self._attempt.preflight):
            return
        ray_node.raise_limits()
        env = json.dumps(asdict(self._env), default=os.fspath)
        looking = ChildProcess(
            f"the preflight of {self._env.node_name}",
            [
                *module_command(sys.executable, "tools.preflight.command"),
                str(self._attempt.run.path),
                str(self._attempt.number),
                env,
            ],
            environment(),
            self._attempt.log("preflight", self._env.node_index),
        )
        # It has deadlines of its own.
        self._wait_until(lambda: not looking.alive(), float("inf"))
        if looking.returncode:
            is_killed = looking.returncode < 0
            raise MachineFailure(looking.exit_summary() if is_killed else last_line(looking.log))
        if not self._is_head:
            return
        logger.info("%s", self._attempt.preflight.with_suffix(".txt").read_text().rstrip())
        verdict = read_json(self._attempt.preflight)
        if verdict["cause"]:
            can_go_on = bool(verdict["excluded"]) and not self._env.local
            raise AttemptOver(FAILED, verdict["cause"], can_go_on=can_go_on)

    def _stage(self) -> None:
        """Have model and environment on this node's own disk where the site asks for it, and wait
        until all nodes have the model that are not lost.
        """
        deadline_s = self._config.cluster.stage_deadline_s
        self._staging = NodeStaging(self._attempt, self._config, self._env.node_index)
        if not self._wait_until(self._staging.is_done, deadline_s):
            self._staging.give_up()
        self._venv = self._staging.venv()
        if wants_copy(self._config):
            folders = (self._attempt.staged(0).parent, self._attempt.lost(0).parent)
            self._wait_until(lambda: not self._missing_nodes(*folders), deadline_s)

    def _start_head(self) -> None:
        """Start the Ray head and tell the other agents of it."""
        host = self._env.address
        first_port = self._env.first_port(self._attempt.path)
        ports, self._ports_holder = hold_consecutive_ports(first_port, 2, host)
        port, client_port = ports
        self._attempt.make_ray_token()
        options = [
            "--head",
            f"--port={port}",
            f"--ray-client-server-port={client_port}",
            "--include-dashboard=false",
            # The autoscaler has no nodes to add.
            "--no-monitor",
        ]
        log = self._start_ray(options)
        # The others may start as soon as the head's port answers, which is before `ray
        # start` is done.
        self._wait_for_ray(lambda: answers(host, port), "the port of the Ray head", log)
        head = {"ray_address": f"{host}:{port}", "node_ip": host}
        publish_json(self._attempt.head, head)
        self._wait_until_started(log)

    def _start_worker(self) -> None:
        """Wait for the Ray head and start a worker that joins it."""

        def head_is_up() -> bool:
            return seen(self._attempt.head) and seen(self._attempt.ray_token)

        awaited = f"the Ray head on {self._env.node_names[0]}"
        self._wait_for_ray(head_is_up, awaited, self._attempt.log("agent", 0))
        ray_address = read_json(self._attempt.head)["ray_address"]
        log = self._start_ray([f"--address={ray_address}"])
        self._wait_until_started(log)

    def _start_ray(self, options: list[str]) -> Path:
        """Start this node's Ray in a new scratch directory; returns its log."""
        # A killed agent of this very job may have left one.
        remove_scratch(self._scratch)
        self._scratch.mkdir(mode=0o700)
        place = (self._env, self._layout, self._scratch, self._venv)
        command = ray_node.start_command(*place, options)
        log = self._attempt.log("ray", self._env.node_index)
        if log.exists():
            # An earlier agent's: this one is waited for by what it writes.
            log.rename(log.with_suffix(".lost.log"))
        self._start(f"Ray on {self._env.node_name}", command, log)
        return log

    def _start_driver(self) -> None:
        place = ["--run", str(self._attempt.run.path), "--attempt", str(self._attempt.number)]
        train = module_command(str(ray_node.bin_of(self._venv) / "python"), "nanoslime.train")
        command = [*(self._driver_command or train), *place]
        self._driver = self._start("the driver", command, self._attempt.log("driver", 0))

    def _start(self, name: str, command: list[str], log: Path) -> ChildProcess:
        logger.info("starting: %s", shlex.join(command))
        caches = kept_caches(self._config.cluster)
        place = (self._attempt.ray_token, self._scratch, caches, self._venv)
        env = ray_node.environment(os.environ, *place)
        child = ChildProcess(name, command, env, log)
        self._children.append(child)
        return child

    def _joined_file(self, node: int) -> Path:
        return self._attempt.path / "nodes" / f"{node}.json"

    def _join(self) -> None:
        """Say that this node's Ray is up."""
        facts = {"name": self._env.node_name, "address": self._env.address, "pid": os.getpid()}
        publish_json(self._joined_file(self._env.node_index), facts)
        logger.info("%s has joined", self._env.node_name)

    def _wait_until_started(self, log: Path) -> None:
        def has_started() -> bool:
            return ray_node.STARTED in log.read_text(errors="replace")

        awaited = f"Ray on {self._env.node_name} ({self._env.address}) to start"
        self._wait_for_ray(has_started, awaited, log)

    def _wait_for_ray(
        self, condition: Callable[[], bool], awaited: str, log: Path, deadline_s: float = 0.0
    ) -> None:
        deadline_s = deadline_s or self._config.cluster.ray_start_deadline_s
        if not self._wait_until(condition, deadline_s):
            raise MachineFailure(
                f"waited {deadline_s:g} s for {awaited}; see {log}: {last_line(log)}"
            )

    def _wait_for_nodes(self, folder: Path) -> None:
        """Wait until each node has its file in a folder."""
        deadline_s = self._config.cluster.node_join_deadline_s
        if not self._wait_until(lambda: not self._missing_nodes(folder), deadline_s):
            missing = ", ".join(self._missing_nodes(folder))
            raise MachineFailure(f"did not join within {deadline_s:g} s: {missing}")

    def _missing_nodes(self, *folders: Path) -> list[str]:
        """The nodes without a file in any of the folders, each with its log."""
        joined = {name for folder in folders for name in os.listdir(folder)}
        missing = [i for i in range(self._env.num_nodes) if f"{i}.json" not in joined]
        names = self._env.node_names
        return [f"{names[i]} (node {i}, {self._attempt.log('agent', i)})" for i in missing]

    def _wait_until(self, condition: Callable[[], bool], deadline_s: float) -> bool:
        """Tick until `condition()` holds; False when `deadline_s` passed first.

        A condition that cannot be read this time does not hold yet.
        """
        deadline = time.monotonic() + deadline_s
        while time.monotonic() <= deadline:
            with suppress(OSError):
                if condition():
                    return True
            self._tick()
            time.sleep(_TICK_S)
        return False

    def _tick(self) -> None:
        """What an agent does whatever it waits for. Raises when the attempt is over, also since a
        newer one has begun.
        """
        own_report().enter(f"the agent of {self._env.node_name}", "watch")
        self._follow_end()
        if time.monotonic() >= self._next_beat_at:
            self._next_beat_at = time.monotonic() + _HEARTBEAT_S
            self._beat()
            self._check_heartbeats()
            with suppress(OSError):
                self._attempt.require_newest()
            if seen(self._attempt.lost(self._env.node_index)):
                raise AttemptOver(DONE, "this node was taken for lost", published=True)
        self._pass_on_signals()
        for child in self._children:
            code = child.poll()
            if code is not None:
                self._handle_exit(child, code)
        if self._is_head:
            self._limit_stop()

    def _beat(self) -> None:
        """Tell the others that this node lives, and what hangs here."""
        found = self._doctor.examine(descendants(os.getpid()))
        for finding in set(found) - self._findings:
            logger.warning("%s", finding.what)
        self._findings = set(found)
        if any(finding.deadline_s for finding in found):
            self._next_beat_at = time.monotonic() + _HURRY_S
        self._num_beats += 1
        try:
            self._attempt.beat(self._env.node_index, self._num_beats, findings=found)
        except OSError as error:
            # The next one may come through. The others end us where none does.
            logger.warning("heartbeat %d was not written: %s", self._num_beats, error)

    def _follow_end(self) -> None:
        """Raises AttemptOver when another agent has published the end of the attempt."""
        end = self._attempt.ended()
        if end is not None:
            raise AttemptOver.by_another(end)

    def _pass_on_signals(self) -> None:
        """Have the driver told to stop for every signal that has come.

        RunError where it is the SIGTERM that comes when this agent's guard dies.
        """
        if self._signals and os.getppid() != self._guard:
            raise MachineFailure(f"the guard of the agent of {self._env.node_name} was killed")
        while self._signals:
            number = self._signals[0]
            logger.warning("%s: the driver is told to stop", number.name)
            requeue = number in WARNINGS
            reason = f"{number.name} at {self._env.node_name}"
            try:
                self._attempt.request_stop(reason, requeue=requeue)
            except OSError as error:
                logger.warning("%s is passed on later: %s", number.name, error)
                return
            self._signals.pop(0)
            if not requeue:
                # SIGKILL follows, from SLURM after KillWait.
                grace_s = self._config.cluster.preemption_grace_s
                patience_s = max(1.0, self._env.kill_wait_s(grace_s) * _KILL_WAIT_SHARE)
                self._kill_at = min(self._kill_at, time.monotonic() + patience_s)

    def _limit_stop(self) -> None:
        """End a stop that takes too long, as soon as that is known: the driver has most of the
        signal lead. What it has committed stays.
        """
        reason = self._attempt.must_stop()
        if reason is None:
            return
        # A cancelled job may have been draining.
        reason = self._attempt.final_stop() or reason
        if self._driver is None:
            raise AttemptOver(STOPPED, f"{reason}, before the driver started")
        if self._kill_at == float("inf"):
            self._kill_at = time.monotonic() + self._config.cluster.drain_s
        left_s = self._kill_at - time.monotonic()
        if left_s < 0:
            raise AttemptOver(STOPPED, f"{reason}; the driver did not commit in time and was ended")
        training_s = rest_of_training_s(self._driver.pid)
        if training_s > left_s:
            raise AttemptOver(
                STOPPED,
                f"{reason}; the step in flight was given up: it had to train for {training_s:.0f} "
                f"s more, and {left_s:.0f} s were left",
            )

    def _handle_exit(self, child: ChildProcess, code: int) -> None:
        """The end of a child ends the attempt: raises AttemptOver or RunError with the reason."""
        if child is self._driver and code == DONE:
            raise AttemptOver(DONE, "")
        if child is self._driver and code == STOPPED:
            asked = self._attempt.final_stop() or self._attempt.must_stop()
            reason = asked or "the driver stopped by itself"
            raise AttemptOver(STOPPED, reason)
        self._pass_on_signals()
        final_stop = self._attempt.final_stop()
        if final_stop:
            raise AttemptOver(STOPPED, f"{final_stop}; {child.exit_summary()}")
        self._follow_end()
        if child is not self._driver:
            raise MachineFailure(child.exit_summary())
        beside = [other for other in self._children if other is not self._driver]
        raise failure_of_driver(self._attempt, child, beside)

    def _check_heartbeats(self) -> None:
        """Finds nodes that are silent. Node 0 looks at all, also at what hangs there, the others at
        node 0; see `_lose`.

        A heartbeat that cannot be read this time is one that has not come.
        """
        now = time.monotonic()
        silence_s = min(_SILENCE_S, learned_s(self._config.cluster, self._beat_intervals))
        watched = range(self._env.num_nodes) if self._is_head else [0]
        beats = self._attempt.heartbeats(watched)
        for node in {*beats, *self._last_beats}:
            last_count, changed_at = self._last_beats.get(node, (-1, now))
            count = beats.get(node, {}).get("count", last_count)
            if "left" in beats.get(node, {}):
                self._last_beats[node] = (count, float("inf"))
            elif count != last_count:
                if node in self._last_beats and changed_at < float("inf"):
                    self._beat_intervals.append(now - changed_at)
                self._last_beats[node] = (count, now)
            elif now - changed_at > silence_s:
                self._lose(int(node), silence_s)
                self._last_beats[node] = (count, float("inf"))
        if self._is_head:
            living = [node for node in beats if self._last_beats[node][1] < float("inf")]
            found = [Finding(*f) for node in living for f in beats[node].get("findings", ())]
            self._doctor.judge(found)

    def _lose(self, node: int, silence_s: float) -> None:
        """Takes a silent node for lost. Raises MachineFailure where the attempt needs it."""
        self._mark_lost(node)
        log = self._attempt.log("agent", node)
        what = f"no heartbeat from {self._env.node_names[node]} (node {node}) for {silence_s:.0f} s"
        if self._layout.roles(node) != "engine":
            self._doctor.end(f"{what}; see {log}")
        logger.error(
            f"{what}: the run goes on without its engines, and takes them back where the node was "
            "only silent; one that SLURM has set DOWN is not given back to a job, so that only the "
            f"next start of the job has it; see {log}"
        )

    def _leave(self, end: AttemptOver) -> int:
        """Publish the end, end all processes, remove scratch, wait for the others."""
        level = logging.ERROR if end.code == FAILED else logging.INFO
        logger.log(level, "end: code %d %s", end.code, end.reason)
        ended_it = not end.published and self._publish_end(end)
        if not ended_it:
            end = AttemptOver.by_another(self._attempt.ended() or (end.code, end.reason))
        own_report().enter(f"the agent of {self._env.node_name}", "leave")
        if self._doctor.stacks.exists():
            pids = descendants(os.getpid())
            self._doctor.write_stacks(pids, f"node-{self._env.node_index}.txt")
        try:
            # They do not get SIGTERM.
            end_descendants(grace_s=0.0)
        finally:
            clean_up(self._attempt, self._env)
        if self._is_head:
            with logged_if_unwritable():
                self._attempt.write_final_status()
        reports_code = self._is_head or ended_it
        if end.code == DONE or not reports_code:
            return 0
        with logged_if_unwritable():
            self._wait_for_others_to_leave()
        return end.code

    def _publish_end(self, end: AttemptOver) -> bool:
        """Whether this agent is the one that ended the attempt; so it is if nobody can say."""
        with logged_if_unwritable():
            return self._attempt.end(end.code, end.reason, can_go_on=end.can_go_on)
        return True

    def _wait_for_others_to_leave(self) -> None:
        """Those that do not leave in time are taken for lost."""
        deadline = time.monotonic() + _LEAVE_S
        staying = {n for n in self._attempt.heartbeats() if not seen(self._attempt.lost(int(n)))}
        while staying and time.monotonic() < deadline:
            beats = self._attempt.heartbeats(map(int, staying))
            staying -= {node for node, beat in beats.items() if "left" in beat}
            time.sleep(_TICK_S)
        for node in staying:
            self._mark_lost(int(node))

    def _mark_lost(self, node: int) -> None:
        with logged_if_unwritable():
            publish_json(self._attempt.lost(node), {"name": self._env.node_names[node]})
