"""The node agent, one per node: it starts Ray, on node 0 the driver too, watches both, ends all it started.

    python -m jobs.node RUN_DIR                                a SLURM task: finds the attempt, guards agent
    python -m jobs.node RUN_DIR --attempt N [--local-node I]   the agent

    check the machine -> Ray head | Ray worker -> all joined: head.json, driver -> watch -> end everything

Agents meet in the attempt's directory: nodes/<i>.json says that a node has joined, heartbeat/<i>.json that it
lives, stop.json that the driver must stop, end.json that the attempt is over and why. Whoever sees the end
first writes it; all others follow. A non-zero exit code comes last, when the other agents have left, since
SLURM then kills the step. Two processes guard each other: the agent's orphans fall to its guard, and an agent
whose guard dies ends.
"""

import argparse
import logging
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from jobs import ray_node
from jobs.cluster_env import ClusterEnv
from nanoslime.config.load import read
from nanoslime.config.run import RunConfig
from nanoslime.layout import Layout
from nanoslime.processes.child import ChildProcess
from nanoslime.processes.command import ask
from nanoslime.processes.logs import last_line
from nanoslime.processes.ports import answers, consecutive_free_ports
from nanoslime.processes.tree import adopt_orphans, end_descendants
from nanoslime.run_dir import DONE, FAILED, STOPPED, Attempt, RunDir
from nanoslime.storage.shared_files import publish_json, read_json, seen
from nanoslime.types import RunError

logger = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parent.parent
_TICK_S = 0.25
_BEAT_S = 5.0
_SILENCE_S = 90.0  # a node whose heartbeat stands still for so long is lost
_LEAVE_S = 30.0  # patience with other agents that clean up
_EXIT_S = 1.5  # our exit makes srun end the other tasks, which have left but may still be on their way out
_CUDA_DEADLINE_S = 30.0


class _Over(Exception):
    """The attempt is over: leave the waiting loops. `ours`: nobody said so before."""

    def __init__(self, code: int, reason: str, ours: bool = True):
        self.code, self.reason, self.ours = code, reason, ours


class Agent:
    """One node's part of one attempt."""

    def __init__(
        self, attempt: Attempt, config: RunConfig, layout: Layout, env: ClusterEnv, driver: str
    ):
        self._attempt, self._config, self._layout, self._env = attempt, config, layout, env
        self._scratch = env.scratch(attempt.path)
        self._driver_command = shlex.split(driver) or [sys.executable, "-m", "nanoslime.train"]
        self._children: list[ChildProcess] = []
        self._driver: ChildProcess | None = None
        self._signals: list[signal.Signals] = []
        self._kill_at = float("inf")  # monotonic; set once the driver was told to stop
        self._beats, self._next_beat = 0, 0.0
        self._heard: dict[str, tuple[int, float]] = {}  # node -> last count, when it changed

    @property
    def _leads(self) -> bool:
        return self._env.node_index == 0

    def run(self) -> int:
        """Live through the attempt. Returns its code on node 0 and on the node that ended it, else 0."""
        adopt_orphans()
        with handled(self._signals.append):
            try:
                self._live()
            except _Over as over:
                end = over
            except RunError as error:
                end = _Over(FAILED, str(error))
            except Exception as error:
                logger.exception("the agent of %s failed", self._env.node_name)
                end = _Over(FAILED, f"agent of {self._env.node_name}: {error!r}")
            return self._leave(end)

    def _live(self) -> None:
        self._tick()
        check_cores(self._env)
        if self._layout.device == "cuda":
            check_gpus(self._env, self._layout.slots_per_node)
        token = self._attempt.path / "ray_token"
        ray_address = self._start_head(token) if self._leads else self._start_worker(token)
        env = self._env
        facts = {
            "index": env.node_index,
            "name": env.node_name,
            "address": env.address,
            "pid": os.getpid(),
        }
        publish_json(self._joined(env.node_index), facts)
        logger.info("%s has joined", env.node_name)
        if self._leads:
            self._wait_for_nodes()
            nodes = [read_json(self._joined(i)) for i in range(env.num_nodes)]
            head = {"ray_address": ray_address, "node_ip": env.address, "token_path": str(token)}
            publish_json(self._attempt.head, {**head, "nodes": nodes})
            where = ["--run", str(self._attempt.run.path), "--attempt", str(self._attempt.number)]
            log = self._attempt.log("driver", 0)
            self._driver = self._start("the driver", [*self._driver_command, *where], log, token)
        while True:
            self._tick()
            time.sleep(_TICK_S)

    def _start_head(self, token: Path) -> str:
        ports = consecutive_free_ports(
            self._env.first_port(self._attempt.path), 2, self._env.address
        )
        ray_node.make_token(token)
        options = ["--head", f"--port={ports[0]}", f"--ray-client-server-port={ports[1]}"]
        log = self._start_ray([*options, "--include-dashboard=false"], token)
        # the others may start as soon as the head's port answers: that is before `ray start` is done
        self._wait_for_ray(
            lambda: answers(self._env.address, ports[0]), "the port of the Ray head", log
        )
        address = f"{self._env.address}:{ports[0]}"
        publish_json(self._attempt.path / "ray_head.json", {"ray_address": address})
        self._wait_until_started(log)
        return address

    def _start_worker(self, token: Path) -> str:
        path, log = self._attempt.path / "ray_head.json", self._attempt.log("agent", 0)
        what = f"the Ray head on {self._env.node_names[0]}"
        self._wait_for_ray(lambda: seen(path) and seen(token), what, log)
        address = str(read_json(path)["ray_address"])
        self._wait_until_started(self._start_ray([f"--address={address}"], token))
        return address

    def _start_ray(self, options: list[str], token: Path) -> Path:
        """Start this node's Ray in a new scratch directory; returns its log."""
        remove_scratch(self._scratch)  # a killed agent of this very job may have left one
        self._scratch.mkdir(mode=0o700)
        command = ray_node.start_command(self._env, self._layout, self._scratch, options)
        log = self._attempt.log("ray", self._env.node_index)
        return self._start(f"Ray on {self._env.node_name}", command, log, token).log

    def _start(self, name: str, command: list[str], log: Path, token: Path) -> ChildProcess:
        logger.info("starting: %s", shlex.join(command))
        env = ray_node.environment(os.environ, token)
        self._children.append(start_child(name, command, env, log, signal.SIGKILL))
        return self._children[-1]

    def _wait_until_started(self, log: Path) -> None:
        what = f"Ray on {self._env.node_name} ({self._env.address}) to start"
        self._wait_for_ray(lambda: ray_node.STARTED in log.read_text(errors="replace"), what, log)

    def _wait_for_ray(self, condition: Callable[[], bool], what: str, log: Path) -> None:
        deadline_s = self._config.cluster.ray_start_deadline_s
        late = f"waited {deadline_s:g} s for {what}; see {log}"
        self._wait(condition, deadline_s, lambda: f"{late}: {last_line(log)}")

    def _joined(self, node: int) -> Path:
        return self._attempt.path / "nodes" / f"{node}.json"

    def _wait_for_nodes(self) -> None:
        names, deadline_s = self._env.node_names, self._config.cluster.node_join_deadline_s

        def missing() -> list[int]:
            there = os.listdir(self._joined(0).parent)
            return [i for i in range(len(names)) if f"{i}.json" not in there]

        def late() -> str:
            nodes = [f"{names[i]} (node {i}, {self._attempt.log('agent', i)})" for i in missing()]
            return f"did not join within {deadline_s:g} s: {', '.join(nodes)}"

        self._wait(lambda: not missing(), deadline_s, late)

    def _wait(
        self, condition: Callable[[], bool], deadline_s: float, late: Callable[[], str]
    ) -> None:
        """Tick until `condition()`; RunError with what `late` says after `deadline_s`."""
        deadline = time.monotonic() + deadline_s
        while not condition():
            if time.monotonic() > deadline:
                raise RunError(late())
            self._tick()
            time.sleep(_TICK_S)

    def _tick(self) -> None:
        """What an agent does all the time, whatever it waits for. Raises when the attempt is over."""
        if (end := self._attempt.ended()) is not None:
            raise _Over(*end, ours=False)
        if time.monotonic() >= self._next_beat:
            self._next_beat = time.monotonic() + _BEAT_S
            self._beats += 1
            self._attempt.beat(self._env.node_index, self._beats)
            self._listen()
        self._pass_on_signals()
        for child in self._children:
            if (code := child.poll()) is not None:
                self._mourn(child, code)
        if self._leads:
            self._limit_stop()

    def _pass_on_signals(self) -> None:
        while self._signals:
            sig = self._signals.pop(0)
            again = sig in (signal.SIGUSR1, signal.SIGUSR2)
            logger.warning("%s: the driver is told to stop", sig.name)
            self._attempt.request_stop(f"{sig.name} at {self._env.node_name}", requeue=again)
            if not again:  # SIGKILL follows, by SLURM after KillWait
                self._kill_at = min(
                    self._kill_at, time.monotonic() + max(1.0, self._env.kill_wait_s() * 0.6)
                )

    def _limit_stop(self) -> None:
        """Without a driver a stop is immediate; the driver has most of the signal lead to commit."""
        reason = self._attempt.must_stop()
        if reason is None:
            return
        if self._driver is None:
            raise _Over(STOPPED, f"{reason}, before the driver started")
        lead_s = self._config.cluster.signal_lead_s * 0.8
        if self._kill_at == float("inf"):
            self._kill_at = time.monotonic() + lead_s
        if time.monotonic() > self._kill_at:
            raise _Over(STOPPED, f"{reason}; the driver did not commit in time and was ended")

    def _mourn(self, child: ChildProcess, code: int) -> None:
        """A child has ended. If by SIGTERM, our own may be on its way, and says better why."""
        stop = self._attempt.must_stop()
        if child is self._driver and code == DONE:
            raise _Over(DONE, "")
        if child is self._driver and code == STOPPED:
            raise _Over(STOPPED, stop or "the driver stopped by itself")
        if -code == signal.SIGTERM or code == 128 + signal.SIGTERM:
            time.sleep(0.5)
            self._pass_on_signals()
            if reason := self._attempt.must_stop():
                raise _Over(STOPPED, f"{reason}; {child.exit_summary()}")
        if (end := self._attempt.ended()) is not None:
            raise _Over(*end, ours=False)
        raise _Over(FAILED, child.exit_summary())

    def _listen(self) -> None:
        """Node 0 listens to all, the others to node 0; one that is silent for too long ends the attempt."""
        for node, beat in self._attempt.heartbeats().items():
            if node != "0" and not self._leads:
                continue
            count, since = self._heard.get(node, (-1, 0.0))
            if beat.get("count", 0) != count:
                self._heard[node] = (beat.get("count", 0), time.monotonic())
            elif time.monotonic() - since > _SILENCE_S and not beat.get("left"):
                name, log = self._env.node_names[int(node)], self._attempt.log("agent", int(node))
                raise RunError(
                    f"no heartbeat from {name} (node {node}) for {_SILENCE_S:g} s; see {log}"
                )

    def _leave(self, end: _Over) -> int:
        """Publish the end, end every process, remove scratch, wait for the others if need be."""
        level = logging.ERROR if end.code == FAILED else logging.INFO
        logger.log(level, "end: code %d %s", end.code, end.reason)
        if end.ours:
            self._attempt.end(end.code, end.reason)
        try:
            end_descendants()
        finally:
            remove_scratch(self._scratch)
            self._attempt.leave(self._env.node_index)
        if self._leads:
            self._publish_end()
        if end.code == DONE or not (end.ours or self._leads):
            return 0
        deadline = time.monotonic() + _LEAVE_S
        while not all("left" in beat for beat in self._attempt.heartbeats().values()):
            if time.monotonic() > deadline:
                break
            time.sleep(_TICK_S)
        return end.code

    def _publish_end(self) -> None:
        """The status of a run whose driver could not say how it ended."""
        run, (code, reason) = self._attempt.run, self._attempt.ended() or (FAILED, "unknown")
        status = run.status()
        if code != DONE and not (
            status.get("attempt") == self._attempt.number and status.get("error")
        ):
            phase = "stopped" if code == STOPPED else "failed"
            run.write_status(phase, int(status.get("step", 0)), error=reason)


@dataclass(frozen=True)
class NodeJob:
    """What a SLURM task runs, under submitit or from a template: guards an agent, and asks for a requeue.

    Pickled by submitit; its state is the path of the run directory, everything else is read there.
    """

    run_dir: str
    driver: str = ""  # for tests: what to start in place of the trainer

    def __call__(self) -> int:
        """Returns DONE, or STOPPED (75) where the job shall be requeued; raises RunError where it failed."""
        run = RunDir.open(Path(self.run_dir))
        config = read(run.config)
        env = ClusterEnv.from_slurm(os.environ, config.cluster.network_interface)
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's handler, if it started us
        attempt = _attempt_of(run, env, config.cluster.ray_start_deadline_s)
        code = self._guard(attempt, config, env)
        if not callable(requeue):  # a SIGTERM that comes now must not replace the exit code
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if code == FAILED:
            raise RunError((attempt.ended() or (FAILED, "unknown"))[1])
        if code != STOPPED or not attempt.requeue_wanted():
            return DONE
        if env.restart_count >= config.cluster.max_requeues:
            limit = f"cluster.max_requeues={config.cluster.max_requeues}"
            raise RunError(f"stopped, and not requeued: {limit} is reached")
        if callable(requeue) and env.node_index == 0:
            signal.raise_signal(signal.SIGUSR2)  # submitit: checkpoint(), scontrol requeue, exit
        return STOPPED

    def _guard(self, attempt: Attempt, config: RunConfig, env: ClusterEnv) -> int:
        """Start the agent, hand signals on to it, wait for it, and clean up after it if it was killed."""
        adopt_orphans()
        agent = start_agent(attempt, config, env, self.driver)
        with handled(agent.send_signal):
            while (code := agent.poll()) is None:
                time.sleep(_TICK_S)
            if code not in (DONE, STOPPED):
                attempt.end(FAILED, agent.exit_summary())
            end_descendants()
            remove_scratch(env.scratch(attempt.path))
            attempt.leave(env.node_index)
        if code != DONE:
            time.sleep(_EXIT_S)
        return code if code in (DONE, STOPPED) else FAILED


def start_agent(attempt: Attempt, config: RunConfig, env: ClusterEnv, driver: str) -> ChildProcess:
    """A node's agent as a child, with the job's environment and this code; it ends when we do."""
    command = [
        sys.executable,
        "-m",
        "jobs.node",
        str(attempt.run.path),
        "--attempt",
        str(attempt.number),
    ]
    command += ["--local-node", str(env.node_index)] if env.local else []
    command += ["--driver", driver] if driver else []
    log, environ = attempt.log("agent", env.node_index), environment(**config.cluster.env)
    return start_child(f"the agent of {env.node_name}", command, environ, log, signal.SIGTERM)


def start_child(
    name: str,
    command: list[str],
    env: Mapping[str, str],
    log: Path,
    death_signal: signal.Signals,
) -> ChildProcess:
    """A child that ignores SIGUSR1 and SIGUSR2, as do all processes below it.

    proctrack/linuxproc delivers the signal of a job to every process, and only guard and agent handle it.
    """
    ignored = (signal.SIGUSR1, signal.SIGUSR2)
    return ChildProcess(name, command, env, log, death_signal, ignored)


def environment(**more: str) -> dict[str, str]:
    """Ours with `more`, and with this code first in PYTHONPATH."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, **more, "PYTHONPATH": path}


@contextmanager
def handled(action: Callable[[signal.Signals], object]) -> Iterator[None]:
    """SIGUSR1, SIGUSR2, SIGTERM and SIGINT call `action`; the handlers before come back at the end."""

    def handler(number: int, _: FrameType | None) -> None:
        action(signal.Signals(number))

    caught = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
    before = {sig: signal.signal(sig, handler) for sig in caught}
    try:
        yield
    finally:
        for sig, previous in before.items():
            signal.signal(sig, previous)


def check_cores(env: ClusterEnv) -> None:
    """RunError where this process may use fewer cores than it was given: a forgotten --cpus-per-task."""
    allowed, given = len(os.sched_getaffinity(0)), min(env.cpus, os.cpu_count() or 1)
    if allowed < given:
        pinned = (
            f"the agent of {env.node_name} is pinned to {allowed} of the {given} cores it was given"
        )
        way_out = f"start it with srun --cpus-per-task={env.cpus}, without taskset or --cpu-bind"
        raise RunError(f"{pinned}; {way_out}")


def check_gpus(env: ClusterEnv, needed: int) -> None:
    """RunError where torch, in a process of its own, does not see exactly the GPUs of the plan."""
    code = "import torch; print(torch.version.cuda, torch.cuda.is_available(), torch.cuda.device_count())"
    done = ask([sys.executable, "-c", code], _CUDA_DEADLINE_S, who=f"torch on {env.node_name}")
    built, available, count = (done.stdout.split() or ["", "", "0"])[-3:]
    if available != "True":
        why = (
            f"it was built for CUDA {built}"
            if built not in ("None", "")
            else "it was built without CUDA"
        )
        raise RunError(
            f"torch of {sys.executable} sees no CUDA on {env.node_name}: {why}. Make the environment with "
            f"`bash env/run.sh --target cuda true`, or look at nvidia-smi there. {done.stderr.strip()[-200:]}"
        )
    if int(count) != needed:
        raise RunError(
            f"{env.node_name} shows {count} GPUs, the plan needs {needed}; check --gpus-per-node"
        )


def remove_scratch(path: Path) -> None:
    """Remove the scratch directory if it is ours; RunError if somebody else's is in its place."""
    if not path.exists():
        return
    if path.is_symlink() or path.stat().st_uid != os.getuid():
        raise RunError(
            f"{path} belongs to another user; it is this job's scratch directory: remove it"
        )
    shutil.rmtree(path, ignore_errors=True)


def _attempt_of(run: RunDir, env: ClusterEnv, deadline_s: float) -> Attempt:
    """The attempt of this life of the job: node 0 makes it, the others wait for it."""
    deadline = time.monotonic() + deadline_s
    while (attempt := run.find_attempt(env.attempt_key)) is None:
        if env.node_index == 0:
            return run.new_attempt(env.attempt_key)
        if time.monotonic() > deadline:
            begin = f"{env.node_names[0]} to begin an attempt in {run.attempts}"
            raise RunError(f"waited {deadline_s:g} s for {begin}")
        time.sleep(_TICK_S)
    return attempt


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.node", description="The node agent of a run."
    )
    add = parser.add_argument
    add("run_dir", type=Path)
    add(
        "--attempt",
        type=int,
        help="be the agent itself; without it, find the attempt and guard one",
    )
    add("--local-node", type=int, help="this node of a rehearsal, rather than SLURM's")
    add("--driver", default="", help="command to start in place of `python -m nanoslime.train`")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        if args.attempt is None:
            return NodeJob(str(args.run_dir), args.driver)()
        run = RunDir.open(args.run_dir)
        attempt, config = run.attempt(args.attempt), read(run.config)
        layout = Layout.from_json(run.plan.read_text())
        if args.local_node is None:
            env = ClusterEnv.from_slurm(os.environ, config.cluster.network_interface)
        else:
            job_id = attempt.key.rpartition("-")[0]
            env = ClusterEnv.for_local(
                args.local_node, layout.num_nodes, job_id, layout.slots_per_node
            )
        return Agent(attempt, config, layout, env, args.driver).run()
    except RunError as error:
        logger.error("%s", error)
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
