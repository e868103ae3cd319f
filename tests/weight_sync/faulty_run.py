"""A run of four trainer ranks (Megatron TP 2 x PP 2, or FSDP) in processes of their own, whose
second sync meets a fault that was put into the sender of one rank.

    rank 0          drives, as under torchrun: Ranks, TorchrunTrainGroup, SyncSession, EnginePool
    ranks 1 to 3    `serve`
    the test        owns the engines, and asks them afterwards what they have

Ranks 0 and 2 send, for the first pipeline stage and the second; ranks 1 and 3 only bring shards.
"""

import copy
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from nanoslime.config import (
    ModelConfig,
    RolloutConfig,
    RunConfig,
    TrainingConfig,
    WeightSyncConfig,
)
from nanoslime.orchestration.torchrun_group import Ranks, TorchrunTrainGroup, serve
from nanoslime.orchestration.worker import TrainWorker
from nanoslime.processes.ports import free_port
from nanoslime.rollout.engines.sglang_client import SGLangEngine
from nanoslime.run_dir import RunDir
from nanoslime.sealed_bucket import HEADER_BYTES, Place
from nanoslime.storage import manifest
from nanoslime.training.backend import RankEnv
from nanoslime.types import RunError
from nanoslime.weight_sync import broadcast, colocated, disk, plan
from nanoslime.weight_sync.devices import SeparateDevices
from nanoslime.weight_sync.engine_pool import EnginePool
from nanoslime.weight_sync.probe import Probe
from nanoslime.weight_sync.session import SyncSession

NUM_RANKS = 4
DEADLINE_S = 8.0
TOKENS = [40 + 7 * i % 200 for i in range(24)]
# What float32 allows; the default of weight_sync.max_logprob_gap is for bfloat16.
MAX_GAP = 1e-3
# The sync that meets the fault.
VERSION = 2
# The sender whose bucket is wrong, and the number of that bucket among its own.
SENDER = 2
NTH = 3
ALWAYS = 10**6


def config(backend: str, compare_every: int = 0) -> RunConfig:
    size = 2 if backend == "megatron" else 1
    return RunConfig(
        model=ModelConfig(dtype="float32"),
        rollout=RolloutConfig(num_rollout=10),
        training=TrainingConfig(
            backend=backend,
            tp_size=size,
            pp_size=size,
            start_deadline_s=120.0,
            # As in the defaults: twice that of weight sync.
            collective_deadline_s=2 * DEADLINE_S,
        ),
        weight_sync=WeightSyncConfig(
            bucket_bytes=30_000, deadline_s=DEADLINE_S, compare_every=compare_every
        ),
    )


@dataclass(frozen=True)
class Case:
    """`fault` is a key of FAULTS; `times` is how often it strikes, ALWAYS as often as it can."""

    fault: str
    transport: str = "broadcast"
    times: int = 1
    rank: int | None = SENDER  # None: all of them
    backend: str = "megatron"
    compare_every: int = 0
    probes: bool = False


@dataclass
class Outcome:
    """What the driver saw of the second sync."""

    old: list[float] = field(default_factory=list)  # the trainer's logprobs before the step
    new: list[float] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""
    lost: dict[str, str] = field(default_factory=dict)  # why, by engine
    warnings: str = ""  # of the driver


class Armed:
    """Says when a fault strikes on this rank: at its NTH bucket of VERSION, so often as it may."""

    def __init__(self, case: Case) -> None:
        self.transport = case.transport
        self._left = case.times
        self._seen = 0

    def at(self, version: int, number: int | None = None) -> bool:
        """Called once for each bucket of the rank, or for each version."""
        if version != VERSION or self._left == 0:
            return False
        self._seen += 1
        if number is not None and self._seen != NTH:
            return False
        self._seen = 0
        self._left -= 1
        return True


def _flip(flat_bucket: torch.Tensor) -> None:
    """The lowest bit of the first element after the header."""
    flat_bucket[HEADER_BYTES] ^= 1


def _sealing(wrap: Callable[..., Callable[..., None]]) -> Callable[[Armed], None]:
    """A fault around `seal`; `wrap(armed, seal)` gives what takes its place."""

    def install(armed: Armed) -> None:
        for module in (broadcast, colocated):
            module.seal = wrap(armed, module.seal)  # type: ignore[attr-defined]

    return install


def _flip_after(armed: Armed, seal: Callable[..., None]) -> Callable[..., None]:
    def faulty(bucket: torch.Tensor, place: Place, *more: Any) -> None:
        seal(bucket, place, *more)
        if armed.at(place.version, place.number):
            _flip(bucket)

    return faulty


def _flip_before(armed: Armed, seal: Callable[..., None]) -> Callable[..., None]:
    def faulty(bucket: torch.Tensor, place: Place, *more: Any) -> None:
        if armed.at(place.version, place.number):
            _flip(bucket)
        seal(bucket, place, *more)

    return faulty


def _noise_before(armed: Armed, seal: Callable[..., None]) -> Callable[..., None]:
    """A tensor of other values, as of a gather that went wrong."""

    def faulty(bucket: torch.Tensor, place: Place, *more: Any) -> None:
        if armed.at(place.version, place.number):
            bucket[HEADER_BYTES:].view(torch.float32).mul_(-3)
        seal(bucket, place, *more)

    return faulty


def _older_label(armed: Armed, seal: Callable[..., None]) -> Callable[..., None]:
    def faulty(bucket: torch.Tensor, place: Place, *more: Any) -> None:
        if armed.at(place.version, place.number):
            place = replace(place, version=place.version - 1)
        seal(bucket, place, *more)

    return faulty


def _older_label_everywhere(armed: Armed, seal: Callable[..., None]) -> Callable[..., None]:
    def faulty(bucket: torch.Tensor, place: Place, *more: Any) -> None:
        if place.version == VERSION:
            place = replace(place, version=place.version - 1)
        seal(bucket, place, *more)

    return faulty


def _in_runs(armed: Armed, change: Callable[[list[Any], int], list[Any]]) -> None:
    """`change` gives what a rank announces and sends in place of the buckets of a run, once the
    fault strikes at the one of this number."""
    announce = broadcast._Wire.announce
    send = broadcast._Wire.send
    # The buckets that are sent, in order, and those of them that are full already.
    changed: list[Any] = []
    copies: dict[int, Any] = {}

    def announcing(wire: Any, buckets: Any) -> None:
        copies.clear()
        changed[:] = buckets
        for number in range(len(buckets)):
            if armed.at(_now[0], number):
                changed[:] = change(list(buckets), number)
        announce(wire, changed)

    def sending(wire: Any, bucket: Any, flat: Any, version: int) -> None:
        copies[id(bucket)] = broadcast._Flat(flat.tensor.clone())
        while changed and id(changed[0]) in copies:
            next_one = changed.pop(0)
            send(wire, next_one, copies[id(next_one)], version)

    broadcast._Wire.announce = announcing  # type: ignore[method-assign]
    broadcast._Wire.send = sending  # type: ignore[method-assign]


def _drop(armed: Armed) -> None:
    """The rank believes that it has sent a bucket."""
    _in_runs(armed, lambda buckets, number: buckets[:number] + buckets[number + 1 :])
    _in_posts(lambda post, engine, payloads: None, armed)


def _exchange(armed: Armed) -> None:
    """A bucket comes after the rank's next one."""

    def exchanged(buckets: list[Any], number: int) -> list[Any]:
        one, other = buckets[number : number + 2]
        return [*buckets[:number], other, one, *buckets[number + 2 :]]

    _in_runs(armed, exchanged)
    last: list[Any] = []

    def swapped(post: Any, engine: Any, payloads: Any) -> None:
        last.append(payloads)

    _in_posts(swapped, armed, lambda: last.pop() if last else None)


def _twice(armed: Armed) -> None:
    _in_runs(armed, lambda buckets, number: [*buckets[: number + 1], *buckets[number:]])

    def twice(post: Any, engine: Any, payloads: Any) -> None:
        post(engine, payloads)
        post(engine, payloads)

    _in_posts(twice, armed)


def _in_posts(
    act: Callable[..., None], armed: Armed, later: Callable[[], Any] = lambda: None
) -> None:
    """The same for payloads: `act` takes the place of a post, `later` gives what comes late."""
    post = SGLangEngine.receive_payloads
    send = colocated.TensorSender.send
    versions: list[int] = []

    def sending(sender: Any, version: int, **options: Any) -> Any:
        versions.append(version)
        return send(sender, version, **options)

    def faulty(engine: Any, payloads: Any) -> None:
        if armed.at(versions[-1], 0):
            act(post, engine, payloads)
            return
        post(engine, payloads)
        late = later()
        if late is not None:
            post(engine, late)

    colocated.TensorSender.send = sending  # type: ignore[method-assign]
    SGLangEngine.receive_payloads = faulty  # type: ignore[method-assign]


def _describing(change: Callable[[plan.FlatBucket], bool]) -> Callable[[Armed], None]:
    """Changes what a bucket's tensors are called, or said to be, when it is sent. `change` says
    whether it could."""

    def install(armed: Armed) -> None:
        announce = broadcast._Wire.announce
        gather = colocated.TensorSender._gather

        def changed(bucket: plan.FlatBucket, version: int) -> plan.FlatBucket:
            other = copy.copy(bucket)
            for name in ("names", "dtypes", "shapes"):
                setattr(other, name, list(getattr(bucket, name)))
            is_due = version == VERSION and len(bucket.names) > 2
            return other if is_due and change(other) and armed.at(version) else bucket

        def announcing(wire: Any, buckets: Any) -> None:
            announce(wire, [changed(bucket, _now[0]) for bucket in buckets])

        def gathering(sender: Any, bucket: Any, flat: torch.Tensor) -> list[bytes]:
            return gather(sender, changed(bucket, _now[0]), flat)

        broadcast._Wire.announce = announcing  # type: ignore[method-assign]
        colocated.TensorSender._gather = gathering  # type: ignore[method-assign]

    return install


# The version that this rank works on, and what it was asked to do with it.
_now: list[Any] = [0, ""]


def _rename(bucket: plan.FlatBucket) -> bool:
    bucket.names[1] += "_renamed"
    return True


def _norms(bucket: plan.FlatBucket) -> list[int]:
    """The places of its norms, which are too small to be cut by rows."""
    return [place for place, name in enumerate(bucket.names) if "norm" in name]


def _reshape(bucket: plan.FlatBucket) -> bool:
    for place in _norms(bucket):
        bucket.shapes[place] = (1, *bucket.shapes[place])
        return True
    return False


def _retype(bucket: plan.FlatBucket) -> bool:
    """As many bytes, which mean something else."""
    bucket.dtypes[1] = torch.int32
    return True


def _repeat_name(bucket: plan.FlatBucket) -> bool:
    for one, other in pairwise(_norms(bucket)):
        bucket.names[other] = bucket.names[one]
        return True
    return False


def _swap_names(bucket: plan.FlatBucket) -> bool:
    """Of the first two tensors that have the same shape."""
    first: dict[tuple[int, ...], int] = {}
    for number, shape in enumerate(bucket.shapes):
        if shape in first:
            other = first[shape]
            names = bucket.names
            names[number], names[other] = names[other], names[number]
            return True
        first[shape] = number
    return False


def _stale(armed: Armed) -> None:
    """The rank sends the weights of the step before."""
    kept: list[Any] = []
    for sender in (broadcast.BroadcastSender, colocated.TensorSender, disk.CheckpointWriter):
        _stale_in(sender, kept)


def _stale_in(sender: Any, kept: list[Any]) -> None:
    init = sender.__init__

    def faulty(self: Any, *args: Any) -> None:
        init(self, *args)
        weights = self._weights
        fresh = weights.shards

        def shards() -> Any:
            now = list(fresh())
            if _now[0] < VERSION:
                kept[:] = [replace(shard, tensor=shard.tensor.clone()) for shard in now]
                return now
            return kept

        self._weights = replace(weights, shards=shards)

    sender.__init__ = faulty


def _signalled(number: signal.Signals, when: str) -> Callable[[Armed], None]:
    """The rank's process gets a signal as it prepares, gathers or sends."""

    def strike(armed: Armed, version: int, nth: int | None = 0) -> None:
        if armed.at(version, nth):
            os.kill(os.getpid(), number)

    def install(armed: Armed) -> None:
        if when == "prepare":
            prepare = TrainWorker.prepare

            def preparing(worker: TrainWorker, version: int) -> None:
                strike(armed, version, None)
                prepare(worker, version)

            TrainWorker.prepare = preparing  # type: ignore[method-assign]
            return
        bring = broadcast.Exchange.bring

        def bringing(exchange: Any, number: int, *more: Any) -> None:
            # Buckets that are brought before the pause are not meant, but all files are.
            if number >= 8 and (_now[1] == "send" or armed.transport == "disk"):
                strike(armed, _now[0], None)
            bring(exchange, number, *more)

        broadcast.Exchange.bring = bringing  # type: ignore[method-assign]

    return install


def _in_files(damage: Callable[[Path], None]) -> Callable[[Armed], None]:
    """Something happens to the files once they are written."""

    def install(armed: Armed) -> None:
        write = disk.CheckpointWriter.write

        def faulty(writer: Any, destination: Path, *, like: Path) -> int:
            num_bytes = write(writer, destination, like=like)
            if armed.at(_now[0]):
                damage(destination)
            return num_bytes

        disk.CheckpointWriter.write = faulty  # type: ignore[method-assign]

    return install


def _weights_file(directory: Path) -> Path:
    return next(iter(sorted(directory.glob("*.safetensors"))))


def _flip_file(directory: Path) -> None:
    path = _weights_file(directory)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def _truncate_file(directory: Path) -> None:
    path = _weights_file(directory)
    os.truncate(path, path.stat().st_size - 1000)


def _remove_file(directory: Path) -> None:
    _weights_file(directory).unlink()


def _remove_manifest(directory: Path) -> None:
    (directory / manifest.NAME).unlink()


def _older_manifest(directory: Path) -> None:
    older = directory.with_name(f"version_{VERSION - 1}")
    (directory / manifest.NAME).write_bytes((older / manifest.NAME).read_bytes())


def _older_files(directory: Path) -> None:
    """All of the version before, in the place of this one: a whole checkpoint."""
    older = directory.with_name(f"version_{VERSION - 1}")
    for path in older.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())


FAULTS: dict[str, Callable[[Armed], None]] = {
    "a bit flipped after the seal": _sealing(_flip_after),
    "a bit flipped before the seal": _sealing(_flip_before),
    "a bucket of other values": _sealing(_noise_before),
    "a bucket of an older label": _sealing(_older_label),
    "all buckets of an older label": _sealing(_older_label_everywhere),
    "a bucket dropped": _drop,
    "two buckets exchanged": _exchange,
    "a bucket sent twice": _twice,
    "a tensor renamed": _describing(_rename),
    "another shape": _describing(_reshape),
    "another dtype": _describing(_retype),
    "a name that comes twice": _describing(_repeat_name),
    "two names exchanged": _describing(_swap_names),
    "the weights of the step before": _stale,
    "SIGKILL as it gathers": _signalled(signal.SIGKILL, "gather"),
    "SIGSTOP as it gathers": _signalled(signal.SIGSTOP, "gather"),
    "SIGKILL as it prepares": _signalled(signal.SIGKILL, "prepare"),
    "SIGSTOP as it prepares": _signalled(signal.SIGSTOP, "prepare"),
    "a bit flipped in a file": _in_files(_flip_file),
    "a file truncated": _in_files(_truncate_file),
    "a file missing": _in_files(_remove_file),
    "no manifest": _in_files(_remove_manifest),
    "the manifest of another version": _in_files(_older_manifest),
    "the files of another version": _in_files(_older_files),
}


# What faults take the place of.
PATCHED: list[tuple[Any, str]] = [
    (broadcast, "seal"),
    (colocated, "seal"),
    (broadcast._Wire, "announce"),
    (broadcast._Wire, "send"),
    (colocated.TensorSender, "send"),
    (colocated.TensorSender, "_gather"),
    (SGLangEngine, "receive_payloads"),
    (disk.CheckpointWriter, "write"),
    (broadcast.Exchange, "bring"),
    (TrainWorker, "prepare"),
    (TrainWorker, "send"),
]


def arm(case: Case) -> None:
    """Puts the fault into the senders of this process."""
    FAULTS[case.fault](Armed(case))
    for method in ("prepare", "send"):
        _note_version(method)


def nudge(worker: TrainWorker) -> None:
    """What a training step is for the sync: other weights, the same on all replicas."""
    with torch.no_grad():
        for shard in worker.backend.weight_shards():
            shard.tensor.mul_(1.05)


def _note_version(method: str) -> None:
    """Notes the version that this rank works on."""
    original = getattr(TrainWorker, method)

    def noting(worker: TrainWorker, version: int, *more: Any) -> Any:
        _now[:] = [version, method]
        return original(worker, version, *more)

    setattr(TrainWorker, method, noting)


@dataclass(frozen=True)
class Scene:
    """Where a case is played."""

    case: Case
    model: Path
    directory: Path
    engines: Sequence[Any]
    ranks_by_engine: Sequence[Sequence[int]]
    init_method: str


def _rank(scene: Scene, rank: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = str(NUM_RANKS)
    log = os.open(scene.directory / f"rank-{rank}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    case = scene.case
    TrainWorker.nudge = nudge  # type: ignore[attr-defined]
    if case.rank in (None, rank):
        arm(case)
    env = RankEnv(rank, NUM_RANKS, rank, "cpu", scene.init_method)
    settings = config(case.backend, case.compare_every)
    if rank:
        serve(env, settings, num_parameters=10**6)
    else:
        _drive(scene, env, settings, pipe)


def _drive(scene: Scene, env: RankEnv, settings: RunConfig, pipe: Any) -> None:
    attempt = RunDir.create(scene.directory, "run").new_attempt()
    ranks = Ranks(env, settings)
    group = TorchrunTrainGroup(settings, attempt, scene.model, ranks)
    group.setup()
    pool = EnginePool(list(scene.engines))
    probe = Probe(TOKENS, MAX_GAP) if scene.case.probes else None
    session = SyncSession(
        group,
        pool,
        SeparateDevices(),
        transport=scene.case.transport,
        directory=scene.directory / "weights",
        deadline_s=DEADLINE_S,
        compare_every=scene.case.compare_every,
        probe=probe,
    )
    session.open(scene.ranks_by_engine)
    session.sync(1)
    outcome = Outcome(old=_scored(group))
    group.call("nudge", what="step")
    outcome.new = _scored(group)
    pipe.send(None)
    pipe.recv()
    begin = time.monotonic()
    try:
        session.sync(VERSION)
    except RunError as error:
        outcome.error = str(error)
    outcome.seconds = time.monotonic() - begin
    if probe is not None and not outcome.error:
        for call in list(probe._asked.values()):
            call.exception(DEADLINE_S)
        try:
            session.sync(VERSION + 1)
        except RunError as error:
            outcome.error = str(error)
    outcome.lost = {p.engine.name: p.cause for p in pool._places if p.cause}
    outcome.warnings = attempt.log("trainer", 0).read_text()
    pipe.send(outcome)


def _scored(group: TorchrunTrainGroup) -> list[float]:
    by_rank = group.call("score", TOKENS, what="score")
    return next(logprobs for logprobs in by_rank if logprobs is not None)


def play(
    case: Case,
    model: Path,
    directory: Path,
    engines: Sequence[Any],
    before_fault: Callable[[], None],
) -> Outcome:
    """Runs the case to its end; `before_fault` is called when the first sync is done."""
    context = multiprocessing.get_context("forkserver")
    preloaded = ["nanoslime.training.megatron.backend", "nanoslime.training.fsdp", __name__]
    context.set_forkserver_preload(preloaded)
    of_engines = [[0, 1], [2, 3]][: len(engines)]
    meeting = f"tcp://127.0.0.1:{free_port('127.0.0.1')}"
    scene = Scene(case, model, directory, engines, of_engines, meeting)
    ours, theirs = context.Pipe()
    ranks = []
    for rank in range(NUM_RANKS):
        process = context.Process(target=_rank, args=(scene, rank, theirs), daemon=True)
        process.start()
        ranks.append(process)
    theirs.close()
    try:
        assert ours.poll(150), _logs(directory)
        ours.recv()
        before_fault()
        ours.send(None)
        assert ours.poll(12 * DEADLINE_S), "the sync did not end\n" + _logs(directory)
        try:
            return ours.recv()
        except EOFError:
            return Outcome(error="the driver died")
    finally:
        for process in ranks:
            process.kill()
        for process in ranks:
            process.join()


def _logs(directory: Path) -> str:
    found = []
    for path in sorted(directory.glob("rank-*.log")):
        found.append(f"{path.name}:\n{path.read_text()[-3000:]}")
    return "\n".join(found)
