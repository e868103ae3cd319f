"""Trainer ranks under torchrun: rank 0 drives, as under Ray; every rank serves its calls.

    rank 0        the training loop in its main thread, and a second thread that serves calls
    other ranks   `serve`: nothing but calls, until rank 0 ends

A call travels to each rank over a connection of its own, and its answer comes back. A
connection that closes says at once that the process behind it has died. A rank whose
call failed ends after its answer, so that the collectives in which the others wait for
it break instead of running into a deadline.
"""

import hmac
import logging
import os
import pickle
import secrets
import signal
import socket
import threading
import time
from collections.abc import Container, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nanoslime.batch import BatchPlan
from nanoslime.config import RunConfig
from nanoslime.config.deadlines import Deadline, derive_deadlines
from nanoslime.failures import summary
from nanoslime.orchestration.groups import TrainGroup
from nanoslime.orchestration.worker import TrainWorker
from nanoslime.processes.logs import logged_to
from nanoslime.processes.phases import IDLE, own_report
from nanoslime.run_dir import Attempt
from nanoslime.training.backend import RankEnv, init_process_group
from nanoslime.types import RunError

logger = logging.getLogger(__name__)

TOKEN_BYTES = 32
NEWS_OF_A_DEATH_S = 2.0
# A rank says who it is as soon as it has connected.
HELLO_S = 30.0


@dataclass(frozen=True, slots=True)
class Call:
    """`method` is `setup`, or a collective method of TrainWorker."""

    method: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of a call, or the reason why it failed."""

    result: Any = None
    failure: str | None = None


class Ranks:
    """The driver's connections to all ranks, its own among them."""

    def __init__(self, env: RankEnv, config: RunConfig):
        """Meets the other ranks. Raises RunError naming those that are late."""
        init_process_group(env, config.training)
        connections = _accept(env, config.training.start_deadline_s)
        connections[0], own_end = Pipe()
        self._connections = [connections[rank] for rank in range(env.world_size)]
        self._thread = threading.Thread(
            target=_answer_calls, args=(env, own_end, None), name="trainer-rank-0", daemon=True
        )
        self._thread.start()
        self.failed = False
        self._earlier_handler = signal.signal(signal.SIGTERM, self._told_to_end)

    def __len__(self) -> int:
        return len(self._connections)

    def ask(self, calls: Sequence[Call], what: str, deadline: Deadline) -> list[Any]:
        """Sends one call to each rank; returns the results in order.

        Raises RunError as soon as one rank fails or dies, or at the deadline. `what`
        says in errors what the ranks were asked to do.
        """
        for rank, call in enumerate(calls):
            self._send(rank, call, what)
        results: dict[int, Any] = {}
        end = time.monotonic() + deadline.seconds
        while len(results) < len(calls):
            pending = self._pending(results)
            ready = wait(pending.values(), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                late = ", ".join(str(rank) for rank in pending)
                raise self._error(f"trainer ranks {late} did not {what} within {deadline} seconds")
            for rank, connection in pending.items():
                if connection in ready:
                    results[rank] = self._result(rank, what)
        return [results[rank] for rank in range(len(calls))]

    def close(self) -> None:
        """Ends the ranks, which wait for their next call, and leaves the process group."""
        for connection in self._connections:
            try:
                connection.send_bytes(pickle.dumps(None))
            except OSError:  # that rank has ended already
                continue
        self._thread.join(timeout=NEWS_OF_A_DEATH_S if self.failed else 60.0)
        for connection in self._connections:
            connection.close()
        if self._thread.is_alive():
            return  # it hangs in a collective; a group that is in use cannot be destroyed
        dist.destroy_process_group()
        if not self.failed:
            signal.signal(signal.SIGTERM, self._earlier_handler)

    def _send(self, rank: int, call: Call, what: str) -> None:
        # Plain pickle: a Connection's own send() would pass tensors as file descriptors.
        try:
            self._connections[rank].send_bytes(pickle.dumps(call))
        except OSError as e:
            raise self._error(f"trainer rank {rank} died before it was asked to {what}") from e

    def _result(self, rank: int, what: str) -> Any:
        answer = self._receive(rank)
        if answer is None:
            raise self._error(f"trainer rank {rank} died while asked to {what}")
        if answer.failure is None:
            return answer.result
        # A death breaks the collectives of all other ranks. A rank that failed by itself
        # ends after its answer, and only then does torchrun end the others, this one too.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        first_gone, silent = self._others()
        if first_gone not in (None, rank):
            raise self._error(f"trainer rank {first_gone} died while asked to {what}")
        hanging = ", ".join(str(other) for other in silent if other != rank)
        if hanging:
            raise self._error(
                f"trainer rank {rank} failed to {what}: {answer.failure}; "
                f"trainer ranks {hanging} have not answered"
            )
        raise self._error(f"trainer rank {rank} failed to {what}: {answer.failure}")

    def _receive(self, rank: int) -> Answer | None:
        """The next answer of a rank; None where its process has died."""
        try:
            return pickle.loads(self._connections[rank].recv_bytes())
        except (EOFError, OSError):
            return None

    def _others(self) -> tuple[int | None, list[int]]:
        """Hears from all ranks but 0 for two seconds.

        Returns the first that ends without another answer, and those that neither answer nor
        end: they hang, or wait for one that does.
        """
        first_gone = None
        heard = {0}
        end = time.monotonic() + NEWS_OF_A_DEATH_S
        while pending := self._pending(heard):
            ready = wait(pending.values(), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                break
            for rank, connection in pending.items():
                if connection not in ready:
                    continue
                if self._receive(rank) is None and first_gone is None:
                    first_gone = rank
                heard.add(rank)
        return first_gone, list(pending)

    def _pending(self, heard: Container[int]) -> dict[int, Connection]:
        return {
            rank: connection
            for rank, connection in enumerate(self._connections)
            if rank not in heard
        }

    def _told_to_end(self, signum: int, frame: Any) -> None:
        """Handles SIGTERM, which torchrun sends to all ranks when one has died."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        dead, _ = self._others()
        if dead is not None:
            raise self._error(f"trainer rank {dead} died")
        raise self._error("torchrun ended the run by SIGTERM")

    def _error(self, message: str) -> RunError:
        """Makes the error and ignores SIGTERM: rank 0 still has to write it down."""
        self.failed = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        logs = "trainer-<rank>.log of the attempt, and torchrun's output"
        return RunError(f"{message}; logs: {logs}")


class TorchrunTrainGroup(TrainGroup):
    """The ranks that torchrun started, as the driver on rank 0 sees them."""

    def __init__(self, config: RunConfig, attempt: Attempt, model_dir: Path, ranks: Ranks):
        super().__init__(config, attempt.run, model_dir, len(ranks))
        self._attempt = attempt
        self._ranks = ranks
        self._dp_ranks: list[int] = []

    def setup(self) -> None:
        call = Call("setup", (self.config, self.model_dir, self._attempt))
        calls = [call] * len(self._ranks)
        places = self._ranks.ask(calls, "load the model", self._deadlines.start)
        self._dp_ranks = [dp_rank for dp_rank, _ in places]
        self.dp_size = places[0][1]

    def _train(self, shards: list[list[BatchPlan]]) -> dict[str, float]:
        calls = [Call("train_plans", (shards[dp_rank],)) for dp_rank in self._dp_ranks]
        return self._ranks.ask(calls, "train", self._deadlines.train)[0]

    def call(self, method: str, *args: Any, what: str, deadline_s: float | None = None) -> Any:
        calls = [Call(method, args)] * len(self._ranks)
        return self._ranks.ask(calls, what, self._deadline(deadline_s))

    def close(self) -> None:
        """Closes the way to the engines; the session ends the ranks."""
        if not self._ranks.failed:
            self.call("close", what="close the way to the engines")


def serve(env: RankEnv, config: RunConfig, num_parameters: int) -> bool:
    """Serves rank 0 until the run ends; returns whether every call went well.

    Raises RunError where rank 0 dies, or has no call for longer than a rollout may take.
    """
    init_process_group(env, config.training)
    connection = _connect(env)
    rollout = config.rollout
    # An evaluation, a commit and all rounds of a rollout lie between two calls.
    num_samplings = 1 + rollout.dynamic_sampling_rounds
    between_s = rollout.start_deadline_s + rollout.request_deadline_s * num_samplings
    deadlines = derive_deadlines(config, num_parameters, env.world_size)
    longest_s = between_s + deadlines.train.seconds + deadlines.save.seconds
    if not _answer_calls(env, connection, longest_s):
        return False
    dist.destroy_process_group()
    return True


def _answer_calls(env: RankEnv, connection: Connection, longest_s: float | None) -> bool:
    """Runs and answers each call that comes, until the run ends.

    Returns True where the driver ended it, False after a call that failed. From `setup` on,
    the rank has a log of its own, since torchrun mixes the output of all.
    """
    if env.device == "cuda":
        # Every thread has a current device of its own.
        torch.cuda.set_device(env.local_rank)
    worker: TrainWorker | None = None
    name = f"trainer rank {env.rank}"
    with ExitStack() as logs:
        while (call := _next_call(env, connection, longest_s)) is not None:
            own_report().enter(name, call.method)
            try:
                if call.method == "setup":
                    config, model_dir, attempt = call.arguments
                    logs.enter_context(logged_to(attempt.log("trainer", env.rank)))
                    worker = TrainWorker(config, model_dir, env, attempt.run)
                    result: Any = (worker.dp_rank, worker.dp_size)
                else:
                    result = getattr(worker, call.method)(*call.arguments)
            except BaseException as e:  # torch's CheckpointException is no Exception
                logger.exception("trainer rank %d failed in %s", env.rank, call.method)
                connection.send_bytes(pickle.dumps(Answer(failure=summary(e))))
                return False
            own_report().enter(name, IDLE)
            connection.send_bytes(pickle.dumps(Answer(result)))
    return True


def _next_call(env: RankEnv, connection: Connection, longest_s: float | None) -> Call | None:
    """None at the end of the run."""
    try:
        if not connection.poll(longest_s):
            raise RunError(f"trainer rank {env.rank} had no call from rank 0 for {longest_s:.0f}s")
        return pickle.loads(connection.recv_bytes())
    except (EOFError, OSError) as e:
        raise RunError(f"trainer rank {env.rank}: rank 0, which drives the run, died") from e


def _accept(env: RankEnv, deadline_s: float) -> dict[int, Connection]:
    """Tells the other ranks where rank 0 listens, and the token that they must show."""
    on_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(env.world_size)
    token = secrets.token_bytes(TOKEN_BYTES)
    connections: dict[int, Connection] = {}
    with socket.create_server(("127.0.0.1" if on_one_machine else "", 0)) as server:
        host = "127.0.0.1" if on_one_machine else os.environ["MASTER_ADDR"]
        dist.broadcast_object_list([(host, server.getsockname()[1], token)], src=0)
        server.settimeout(deadline_s)
        while len(connections) < env.world_size - 1:
            try:
                peer, _ = server.accept()
            except TimeoutError as e:
                late = [rank for rank in range(1, env.world_size) if rank not in connections]
                raise RunError(
                    f"trainer ranks {late} did not connect to rank 0 at {host} within "
                    f"training.start_deadline_s={deadline_s:g}"
                ) from e
            peer.settimeout(None)
            connection = Connection(peer.detach())
            hello = _hello(connection)
            if hmac.compare_digest(hello[:TOKEN_BYTES], token):
                connections[int(hello[TOKEN_BYTES:])] = connection
            else:
                connection.close()
    return connections


def _hello(connection: Connection) -> bytes:
    """What a peer says first: the token and its rank; nothing where it is silent or hangs up."""
    try:
        if not connection.poll(HELLO_S):
            return b""
        return connection.recv_bytes(maxlength=2 * TOKEN_BYTES)
    except (EOFError, OSError):
        return b""


def _connect(env: RankEnv) -> Connection:
    """Connects a rank other than 0 to the driver."""
    told: list[Any] = [None]
    dist.broadcast_object_list(told, src=0)
    host, port, token = told[0]
    connection = Connection(socket.create_connection((host, port)).detach())
    connection.send_bytes(token + str(env.rank).encode())
    return connection
