"""Actors on the nodes of a run, how they start, and who is to blame when one fails."""

import logging
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from nanoslime.config import RunConfig
from nanoslime.config.deadlines import Deadline
from nanoslime.failures import is_of_machine, summary
from nanoslime.orchestration.rank_environment import (
    INTERFACE,
    NCCL_MEMORY,
    interface_names,
    interface_of,
    nccl_defaults,
    num_threads,
)
from nanoslime.orchestration.ray.cluster import NODE_LABEL, slots_option
from nanoslime.processes.logs import FORMAT, set_level
from nanoslime.run_dir import Attempt
from nanoslime.storage.shared_files import read_json, seen
from nanoslime.types import MachineFailure, RunError

logger = logging.getLogger(__name__)
# What an actor writes of its environment into its log.
REPORTED = ("OMP_NUM_THREADS", *INTERFACE, *NCCL_MEMORY)


@dataclass(frozen=True, slots=True)
class ActorSetup:
    """What an actor process is told when it starts."""

    index: int  # the rank of a trainer, the number of an engine
    config: RunConfig
    model_dir: Path
    device: Literal["cpu", "cuda"]
    log: Path
    users_threads: str | None  # the job's OMP_NUM_THREADS; Ray sets that of an actor
    num_neighbours: int  # actors of its kind on its machine, itself included

    def enter(self) -> None:
        """Sends the output of this process to its own log of the attempt, and sets what NCCL, gloo
        and torch read in it.
        """
        with self.log.open("ab") as log:
            os.dup2(log.fileno(), sys.stdout.fileno())
            os.dup2(log.fileno(), sys.stderr.fileno())
        logging.basicConfig(format=FORMAT, stream=sys.stderr, force=True)
        set_level(self.config.log_level)
        address = ray.util.get_node_ip_address()
        interface = self.config.cluster.network_interface
        interface = interface or interface_of(address, ipv4_addresses())
        os.environ.update(interface_names(os.environ, interface))
        os.environ.update(nccl_defaults(os.environ, self.config.rollout.sglang))
        cores = len(os.sched_getaffinity(0))
        threads = num_threads(self.users_threads, cores, self.num_neighbours)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
        shown = {name: os.environ[name] for name in REPORTED if name in os.environ}
        logger.info("environment: %s", shown)


def ipv4_addresses() -> dict[str, list[str]]:
    """The IPv4 addresses of each interface of this machine."""
    return {
        name: [entry.address for entry in entries if entry.family == socket.AF_INET]
        for name, entries in psutil.net_if_addrs().items()
    }


@dataclass(frozen=True, slots=True)
class ActorPlace:
    """Where the plan puts an actor."""

    index: int
    node: int
    num_slots: int  # of the node's GPUs or CPU slots


@dataclass(frozen=True, slots=True)
class RunOnRay:
    """What all actors of a run have in common."""

    config: RunConfig
    attempt: Attempt
    model_dir: Path

    def model_dir_on(self, node: int) -> Path:
        """Where the actors of a node read the model: on its own disk where its agent has put it
        there.
        """
        staged = self.attempt.staged(node)
        if not seen(staged):
            return self.model_dir
        found = read_json(staged)
        if found["note"]:
            logger.warning("node %d reads the shared model: %s", node, found["note"])
        return Path(found["path"])


class Actors:
    """One actor for each place, on just the node that the plan names.

    Their results are waited for together, with a deadline and a name for whoever fails.
    """

    def __init__(
        self,
        actor_class: Any,
        role: str,
        short_role: str,
        places: Sequence[ActorPlace],
        run: RunOnRay,
        max_concurrency: int = 1,
    ):
        """`max_concurrency` is how many calls of one actor run at once, in threads of it.

        Errors name actors by `role`, as "trainer rank"; Ray, and their logs, by `short_role`."""
        device = run.config.cluster.device
        places_by_node = Counter(place.node for place in places)
        self.actors: list[Any] = []
        self._names: list[str] = []
        self._logs: list[Path] = []
        for place in places:
            log = run.attempt.log(short_role, place.index)
            options = actor_class.options(
                name=f"{short_role}-{place.index}",
                num_cpus=0,
                max_concurrency=max_concurrency,
                label_selector={NODE_LABEL: str(place.node)},
                **slots_option(place.num_slots, device),
            )
            setup = ActorSetup(
                index=place.index,
                config=run.config,
                model_dir=run.model_dir_on(place.node),
                device=device,
                log=log,
                users_threads=os.environ.get("OMP_NUM_THREADS"),
                # The nodes of a rehearsal are one machine.
                num_neighbours=places_by_node[place.node] if device == "cuda" else len(places),
            )
            self.actors.append(options.remote(setup))
            self._names.append(f"{role} {place.index} on node {place.node}")
            self._logs.append(log)

    def start_on_each(self, method: str, *args: Any) -> list[Any]:
        """Starts the call on every actor; `gather` waits for the results."""
        return [getattr(actor, method).remote(*args) for actor in self.actors]

    def kill(self) -> None:
        for actor in self.actors:
            ray.kill(actor)

    def gather(
        self, refs: list[Any], what: str, deadline: Deadline, asked: Sequence[int] = ()
    ) -> list[Any]:
        """Waits for one result of each actor; returns the results in order.

        `asked` are the actors of the calls, where it was not each of them once. Raises
        RunError as soon as one actor fails or dies, or at the deadline. `what` says in
        errors what the actors were asked to do.
        """
        actor_of = dict(zip(refs, asked or range(len(refs)), strict=True))
        pending = list(refs)
        end = time.monotonic() + deadline.seconds
        while pending:
            time_left_s = max(0.0, end - time.monotonic())
            ready, pending = ray.wait(pending, num_returns=1, timeout=time_left_s)
            if not ready:
                late = [actor_of[ref] for ref in pending]
                names = ", ".join(self._names[i] for i in late)
                raise MachineFailure(
                    f"{names} did not {what} within {deadline} seconds; log: {self._logs[late[0]]}"
                )
            self._check(actor_of[ready[0]], ready[0], what)
        return ray.get(refs)

    def _check(self, i: int, ref: Any, what: str) -> None:
        """Raises RunError where the finished call `ref` of actor `i` has failed."""
        try:
            ray.get(ref)
        except RayActorError as e:
            if e.actor_init_failed:  # before it had a log; the cause comes last
                reason = str(e).splitlines()[-1]
                raise RunError(f"{self._names[i]} failed to start: {reason}") from e
            raise self._died(i, what) from e
        except RayError as e:
            dead, silent = self._others()  # a death breaks the collectives of all other ranks
            if dead is not None:
                raise self._died(dead, what) from e
            if silent:
                names = ", ".join(self._names[other] for other in silent)
                raise MachineFailure(
                    f"{self._names[i]} failed to {what}: {summary(e)}; {names} do not answer; "
                    f"log: {self._logs[silent[0]]}"
                ) from None
            # The actor has told its own log and us in one line.
            kind = MachineFailure if is_of_machine(e) else RunError
            raise kind(
                f"{self._names[i]} failed to {what}: {summary(e)}; log: {self._logs[i]}"
            ) from None

    def _died(self, i: int, what: str) -> MachineFailure:
        return MachineFailure(f"{self._names[i]} died while asked to {what}; log: {self._logs[i]}")

    def _others(self) -> tuple[int | None, list[int]]:
        """Asks all actors; returns the first dead one, and those that do not answer within two
        seconds: they may hang, and the others wait for them."""
        pings = self.start_on_each("__ray_ready__")
        ray.wait(pings, num_returns=len(pings), timeout=2.0)
        silent = []
        for i, ping in enumerate(pings):
            try:
                ray.get(ping, timeout=0)
            except RayActorError:
                return i, []
            except GetTimeoutError:
                silent.append(i)
            except RayError:
                continue
        return None, silent
