"""Runs inside SGLang's own processes (its entry point group `sglang.srt.plugins`),
never in ours.

Stock SGLang 0.5.23 answers success to a weight update with unknown names, loading
nothing, and does not notice missing ones. With this plug-in, an update from a directory or in a
session (begin ... end) has to bring the trained tensors of the model that the server was
started from.
An unknown or repeated name, another shape, or a bucket that is not the next one or has other
bytes than were sent (sealed_bucket.py), is refused before anything is loaded; a session or a
directory that lacks a tensor is refused with its name, and a directory that differs from the
manifest that it may have. What one rank of the engine refuses, the engine refuses. A
refusal is an error response (success false); the server goes on.

An engine into which a part of an update was loaded generates nothing, whoever resumes it, until a
whole one has come. Ways past the checks are refused.

The experts that its routers choose leave the scheduler in one byte each where they can, not in
four: they are nearly all of an answer. On a machine without CUDA the plug-in also lets SGLang
keep them in ordinary memory.
"""

import json
import logging
import multiprocessing
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sglang.srt.managers.io_struct import (
    BeginWeightUpdateReqOutput,
    CheckWeightsReqOutput,
    UpdateWeightFromDiskReqOutput,
)
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket
from torch import Tensor

from nanoslime.process_groups import listening_store, one_ahead
from nanoslime.processes.phases import own_report, report_anew
from nanoslime.rollout import weight_check
from nanoslime.rollout.engines.sglang_client import AGREE, COMPARING
from nanoslime.rollout.weight_check import ExpectedTensors, Named, checkpoint_shapes
from nanoslime.sealed_bucket import HEADER, MORE, Part, Place, broken_seal, place_of, wrong_parts
from nanoslime.shared_bytes import shared_bytes
from nanoslime.storage import manifest
from nanoslime.types import RunError

logger = logging.getLogger(__name__)

_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
_MANAGER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_INGEST = "sglang.srt.managers.scheduler.Scheduler.ingest_requests"
_COLLECT_EXPERTS = (
    "sglang.srt.managers.scheduler_components.batch_result_processor"
    ".SchedulerBatchResultProcessor._maybe_collect_routed_experts"
)
_COMMAND_LINE = "sglang.srt.sampling.watermarking.core.redact_watermark_command_line"
_PATH_OF_LOADS = "sglang.srt.managers.load_snapshot.shm_path_for"
_START_METHOD = "sglang.srt.entrypoints.engine._set_envs_and_config"
_PIN_MEMORY = "sglang.srt.mem_cache.pool_host.common._cuda_host_register"

# The client looks for this mark in the last model's answer.
_OF_DRAFT = "no tensors checked: a model that drafts tokens keeps its weights"

# Success and a message.
Result = tuple[bool, str]
# The function that a hook stands in for; the hook returns the same type.
Original = Callable[..., Any]


def register() -> None:
    """Install the hooks. SGLang calls it once in each of its processes."""
    own_report()  # so that each shows its stacks
    # When CPython 3.12 starts its tracker it lets SIGTERM and SIGINT through, which are held back
    # from all that an agent starts.
    resource_tracker._HAVE_SIGMASK = False
    guard = WeightGuard()
    hooks: dict[str, list[Callable]] = {
        f"{_UPDATER}.update_weights_from_disk": [guard.disk],
        f"{_UPDATER}.receive_weights_from_distributed": [one_after_another],
        f"{_UPDATER}.load_weights_from_distributed": [guard.buckets],
        f"{_UPDATER}.update_weights_from_tensor": [guard.bucket],
        f"{_UPDATER}.update_weights_from_ipc": [refuse_unchecked],
        f"{_UPDATER}.begin_weight_update": [guard.begin],
        f"{_UPDATER}.destroy_weights_update_group": [leave_groups],
        f"{_MANAGER}.update_weights_from_disk": [guard.of_all_ranks, guard.verify_files],
        f"{_MANAGER}.update_weights_from_distributed": [guard.of_all_ranks],
        f"{_MANAGER}.update_weights_from_tensor": [guard.of_all_ranks],
        f"{_MANAGER}.check_weights": [guard.answer_agree, guard.of_all_ranks],
        f"{_MANAGER}.begin_weight_update": [guard.answer_begin],
        f"{_MANAGER}.end_weight_update": [guard.answer_end, guard.of_all_ranks],
        _INGEST: [guard.hold],
        _COLLECT_EXPERTS: [_collect_small_experts],
        "sglang.srt.server_args.ServerArgs.resolved_dict": [hide_key],
        _COMMAND_LINE: [hide_key_in_command],
        "torch.distributed.rendezvous._create_c10d_store": [listen_at_own_address],
        _PATH_OF_LOADS: [_named_by_group],
    }
    for target, of_target in hooks.items():
        for hook in of_target:
            HookRegistry.register(target, hook, HookType.AROUND)
    if not torch.cuda.is_available():
        # SGLang pins the host's buffer for routed experts by a call of CUDA.
        HookRegistry.register(_PIN_MEMORY, _leave_unpinned, HookType.REPLACE)
        HookRegistry.register(_START_METHOD, _fork_others, HookType.AROUND)


def _leave_unpinned(*arguments: object) -> None:
    """Stands in for cudaHostRegister."""


def _fork_others(original: Original, *arguments: Any) -> None:
    """The other processes of a server are copies of the first one, which has imported SGLang.

    Each would else spend ten seconds of a processor on the same imports. CUDA does not work in
    copies; without it the first process has no thread yet that they would miss.
    """
    original(*arguments)
    multiprocessing.set_start_method("fork", force=True)
    os.register_at_fork(after_in_child=report_anew)


def _named_by_group(original: Original, instance: str) -> str:
    """SGLang leaves this file behind; its owner knows the process group, and removes it."""
    return original(f"{os.getpgid(0)}-{instance}")


def _collect_small_experts(original: Original, processor: Any, request: Any) -> None:
    original(processor, request)
    experts = request.routed_experts
    if experts is not None and experts.numel() and experts.max() < 256:
        request.routed_experts = experts.to(torch.uint8)


def hide_key(original: Original, arguments: Any) -> dict[str, Any]:
    """The options as SGLang logs them when it starts, dumps them, and tells /server_info."""
    options = original(arguments)
    return {**options, "api_key": options["api_key"] and "hidden"}


def hide_key_in_command(original: Original, words: Sequence[str], *others: Any) -> str:
    """SGLang puts what its config file says into the command line that it tells of itself."""
    shown = list(words)
    if "--api-key" in shown:
        shown[shown.index("--api-key") + 1] = "hidden"
    return original(shown, *others)


def listen_at_own_address(original: Original, *arguments: Any) -> dist.Store:
    """The store where the processes of an engine meet: torch's own listens at all addresses."""
    host, port, rank, _, timeout, *_ = arguments
    if rank == 0:
        return listening_store(host, port, timeout)
    return original(*arguments)


def leave_groups(original: Original, updater: Any, group_name: str) -> Result:
    """Leaves all groups whose names begin so: every sender of weights has one of its own."""
    names = [name for name in updater._model_update_group if name.startswith(group_name)]
    results = [original(updater, name) for name in names or [group_name]]
    failures = [message for success, message in results if not success]
    return not failures, "; ".join(failures) or f"left {len(names)} groups"


def one_after_another(original: Original, updater: Any, **run: Any) -> Iterator[Any]:
    """One call may announce several buckets: each is received when it is asked for, and on a CPU
    while the one before it is looked at and loaded."""
    starts = [number for number, name in enumerate(run["names"]) if name == HEADER]
    receives = []
    for start, stop in pairwise([*(starts or [0]), len(run["names"])]):
        bucket = {name: run[name][start:stop] for name in ("names", "dtypes", "shapes")}
        receives.append(partial(original, updater, **run | bucket))
    if updater.device == "cpu":
        return one_ahead(receives)
    return (receive() for receive in receives)


def refuse_unchecked(original: Original, updater: Any, request: Any) -> Result:
    """Stands in for an update that has neither header nor end."""
    return False, "refused: weights that come by this way are not checked"


@dataclass(slots=True)
class _Received:
    """What has come in a session."""

    updater: Any
    expected: ExpectedTensors
    names: set[str] = field(default_factory=set)
    # Of tensors that are larger than a bucket, while further rows follow.
    rows: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    last: Place | None = None
    # Whether the parameters were made NaN before: this is the first update of the process.
    is_first: bool = False
    # Where the update compares: the parameters before it.
    before: dict[str, list[int]] | None = None

    def first_problem(self, named: Iterable[Named]) -> str | None:
        """What is wrong with one of these tensors; rows are looked at once all have come."""
        whole = []
        for name, shape in named:
            if not name.endswith(MORE) and name not in self.rows:
                whole.append((name, shape))
        return self.expected.first_problem(whole, self.names)

    def load(self, original: Original, tensors: Any) -> Result:
        """Loads the tensors of a bucket that are whole now, and keeps the rows of others."""
        if isinstance(tensors, dict):
            tensors = FlattenedTensorBucket(**tensors).reconstruct_tensors()
        whole = []
        for name, tensor in tensors:
            if name.endswith(MORE):
                self.rows[name.removesuffix(MORE)].append(tensor.clone())
            else:
                rows = self.rows.pop(name, [])
                whole.append((name, torch.cat([*rows, tensor]) if rows else tensor))
        problem = self.first_problem((name, tuple(tensor.shape)) for name, tensor in whole)
        if problem:
            return False, f"refused: {problem}"
        self.names.update(name for name, _ in whole)
        return original(self.updater, whole) if whole else (True, "rows are kept")

    def problem(self) -> str | None:
        """What is wrong with the update, at its end."""
        problem = self.expected.missing(self.names)
        if problem is None and self.last and self.last.number + 1 != self.last.num_buckets:
            problem = f"{self.last.number + 1} of {self.last.num_buckets} buckets came"
        if problem is None and self.is_first:
            problem = weight_check.left_empty(self.updater.get_model())
        if problem is None and self.before is not None:
            problem = weight_check.changed(self.updater.get_model(), self.before)
        return problem


class WeightGuard:
    """Knows which tensors this process may receive, and which it has received in the session.

    SGLang has one weight updater for each model runner of a process; both facts are
    kept by the id() of the updater.
    """

    def __init__(self) -> None:
        self._expected: dict[int, ExpectedTensors] = {}
        self._received: dict[int, _Received] = {}
        # Those that have had a whole update.
        self._filled: set[int] = set()
        # A rank of this engine may have a part of an update, or none of any.
        self._is_mixed = False
        # The scheduler would generate, if its weights were whole.
        self._holds = False

    def hold(self, original: Original, scheduler: Any, **options: Any) -> Any:
        """Has the scheduler stand still after its requests were received, whatever they were,
        as long as its weights may be a mixture. Where an idle scheduler sleeps until a request
        comes, one that stands still does too: SGLang's own loop would keep a core busy."""
        if scheduler._engine_paused:
            scheduler.maybe_sleep_on_idle()
        if self._holds:
            scheduler._engine_paused = False
        received = original(scheduler, **options)
        would_generate = self._is_mixed and not scheduler._engine_paused
        if would_generate:
            scheduler._engine_paused = True
            if not self._holds:
                logger.warning("nothing is generated until a whole version of the weights has come")
        self._holds = would_generate
        return received

    def of_all_ranks(self, original: Original, manager: Any, request: Any) -> Any:
        """SGLang gives the answer of its first rank; this one is the first refusal of any."""
        answer = original(manager, request)
        mine = (answer.success, answer.message, self._is_mixed)
        answers: list[Any] = [mine] * dist.get_world_size(manager.tp_cpu_group)
        dist.all_gather_object(answers, mine, manager.tp_cpu_group)
        self._is_mixed = any(is_mixed for _, _, is_mixed in answers)
        for rank, (success, message, _) in enumerate(answers):
            if not success:
                answer.success = False
                answer.message = message if len(answers) == 1 else f"rank {rank}: {message}"
                break
        return answer

    def verify_files(self, original: Original, manager: Any, request: Any) -> Any:
        """Before any rank loads a file, each has hashed a share of all."""
        answer = self.of_all_ranks(_verified_share, manager, request)
        return original(manager, request) if answer.success else answer

    def begin(self, original: Original, updater: Any) -> None:
        if not _is_draft(updater):
            self._received[id(updater)] = _Received(updater, self._expected_by(updater))
        original(updater)

    def answer_agree(self, original: Original, manager: Any, request: Any) -> Any:
        """Whether an update with the tensors of `skip_tensor_list` is one of the loaded model."""
        if AGREE not in (request.skip_tensor_list or ()):
            self._is_mixed |= request.action == "reset_tensors"
            return original(manager, request)
        sent = json.loads(request.skip_tensor_list[1])
        updater = manager.tp_worker.model_runner.weight_updater
        try:
            problem = self._expected_by(updater).disagreement(sent, updater.get_model())
        except (OSError, ValueError, RunError) as e:
            problem = f"tensor names cannot be checked: {e}"
        message = problem or f"{len(sent)} tensors agreed"
        return CheckWeightsReqOutput(success=problem is None, message=message)

    def answer_begin(self, original: Original, manager: Any, request: Any) -> Any:
        try:
            answer = original(manager, request)
        except (OSError, ValueError, RunError) as e:
            message = f"tensor names cannot be checked: {e}"
            return BeginWeightUpdateReqOutput(success=False, message=message)
        if answer.success:
            num_expected = sum(len(r.expected.required) for r in self._received.values())
            answer.message = f"{num_expected} tensors expected"
        return answer

    def buckets(self, original: Original, updater: Any, received: Iterable[Any]) -> Result:
        """Loads each of them before the next one is received. After a refusal the others are only
        received, so that their sender does not wait."""
        result = True, _OF_DRAFT
        try:
            for named_tensors in received:
                if result[0]:
                    result = self.bucket(original, updater, named_tensors)
        except Exception as e:
            # Their sender is gone.
            return False, f"weights were not received: {type(e).__name__}: {e}"
        return result

    def bucket(
        self, original: Original, updater: Any, named_tensors: Any, **options: Any
    ) -> Result:
        """Load one bucket of the session, or refuse the whole of it.

        `named_tensors` are (name, tensor) pairs, or a flat tensor with the metadata of
        its parts, of which a trainer on the CPU gives a handle (shared_bytes.py); the first one is
        the header.
        """
        if _is_draft(updater):
            return True, _OF_DRAFT
        try:
            flat, parts, tensors = _opened(named_tensors)
        except RunError as e:
            return False, f"refused: {e}"
        names = [(name, tuple(shape)) for name, _, shape in parts]
        received = self._received[id(updater)]
        problem = "it has no header"
        if flat is not None:
            problem = broken_seal(flat, received.last)
            problem = problem or received.first_problem(names)
            problem = problem or wrong_parts(flat, parts)
        if problem:
            return False, f"refused: {problem}"
        place = place_of(flat)
        load = partial(received.load, original, tensors)
        success, message = self._load(load, received, compares=place.compares)
        if success:
            received.last = place
        return success, message

    def disk(
        self, original: Original, updater: Any, model_path: str, load_format: str, **options: Any
    ) -> Result:
        """Load a directory; with COMPARING as its `load_format`, one that is loaded already."""
        if _is_draft(updater):
            return True, _OF_DRAFT
        received = _Received(updater, self._expected_by(updater))
        try:
            found = checkpoint_shapes(model_path)
        except (OSError, ValueError, RunError) as e:
            return False, f"refused {model_path}: {e}"
        problem = received.expected.first_problem(found.items())
        received.names.update(found)
        problem = problem or received.expected.missing(found)
        if problem:
            return False, f"refused {model_path}: {problem}"
        compares = load_format == COMPARING
        load_format = "auto" if compares else load_format
        load = partial(original, updater, model_path, load_format, **options)
        success, message = self._load(load, received, compares=compares)
        if not success:
            return False, message
        problem = received.problem()
        if problem:
            return False, f"refused {model_path}: {problem}"
        self._filled.add(id(updater))
        self._is_mixed = False
        return True, f"{message} {len(found)} tensors checked."

    def answer_end(self, original: Original, manager: Any, request: Any) -> Any:
        sessions = self._received.values()
        self._received = {}
        problems = [received.problem() for received in sessions]
        answer = original(manager, request)
        if not answer.success:
            return answer
        self._is_mixed = any(problems)
        for received, problem in zip(sessions, problems, strict=True):
            if received.last is not None:
                answer.message = f"version {received.last.version}"
            if problem:
                answer.success = False
                answer.message = f"refused: {problem}; the weights may be a mixture of two versions"
            else:
                self._filled.add(id(received.updater))
        return answer

    def _load(self, load: Callable[[], Result], received: _Received, *, compares: bool) -> Result:
        try:
            if received.last is None:
                self._watch(received, compares=compares)
            self._is_mixed = True
            return load()
        except Exception as e:
            # Whatever is raised here would end the scheduler process.
            return False, f"the weights may be a mixture of two versions: {type(e).__name__}: {e}"

    def _watch(self, received: _Received, *, compares: bool) -> None:
        """Before the first tensor of an update is loaded."""
        model = received.updater.get_model()
        if compares:
            received.before = weight_check.fingerprints(model)
        elif id(received.updater) not in self._filled:
            received.is_first = True
            weight_check.empty(model)

    def _expected_by(self, updater: Any) -> ExpectedTensors:
        """The tensors of the model that the server was started from.

        They are read the first time, before an update changes the path that the updater
        knows.
        """
        if id(updater) not in self._expected:
            path = updater.model_config.model_path
            self._expected[id(updater)] = ExpectedTensors.of_checkpoint(path)
        return self._expected[id(updater)]


def _verified_share(manager: Any, request: Any) -> Any:
    """Whether this rank's share of a directory's files is what the manifest says."""
    path = Path(request.model_path)
    message = ""
    try:
        if (path / manifest.NAME).exists():
            group = manager.tp_cpu_group
            manifest.verify(path, dist.get_rank(group), dist.get_world_size(group))
    except (OSError, RunError) as e:
        message = f"refused {path}: {e}"
    return UpdateWeightFromDiskReqOutput(
        success=not message, message=message, num_paused_requests=0
    )


def _is_draft(updater: Any) -> bool:
    """Whether its model only drafts tokens for another one. Nobody trains it: it keeps its own
    weights, and shares those that it has of the other one."""
    return updater.get_model_runner().is_draft_worker


def _opened(named_tensors: Any) -> tuple[torch.Tensor | None, list[Part], Any]:
    """A bucket as one flat tensor, what its tensors are said to be, and what SGLang loads of it.

    The flat tensor is None where the first tensor is no header. Raises RunError where it lies in
    memory that this process cannot open.
    """
    if isinstance(named_tensors, dict):
        metadata = named_tensors["metadata"]
        if not metadata or metadata[0].name != HEADER:
            return None, [], None
        parts = [(part.name, part.dtype, part.shape) for part in metadata[1:]]
        flat = named_tensors["flattened_tensor"]
        if not isinstance(flat, Tensor):
            flat = shared_bytes(flat)
        return flat, parts, {"flattened_tensor": flat, "metadata": metadata[1:]}
    if not named_tensors or named_tensors[0][0] != HEADER:
        return None, [], None
    (_, header), *tensors = named_tensors
    num_bytes = header.nbytes + sum(tensor.nbytes for _, tensor in tensors)
    storage = torch.empty(0, dtype=torch.uint8, device=header.device)
    storage.set_(header.untyped_storage())
    parts = [(name, tensor.dtype, tensor.shape) for name, tensor in tensors]
    return storage[:num_bytes], parts, tensors
