"""Runs inside SGLang's own processes (its entry point group `sglang.srt.plugins`),
never in ours.

Stock SGLang 0.5.23 answers success to a weight update with unknown names, loading
nothing, and does not notice missing ones. With this plug-in, whichever way an update
comes, its tensors are the trained ones of the model that the server was started from.
An unknown or repeated name, or another shape, is refused before anything is loaded; a
session (begin ... end) or a directory that lacks a tensor is refused with its name. A
refusal is an error response (success false); the server goes on.

The experts that its routers choose leave the scheduler in one byte each where they can, not in
four: they are nearly all of an answer. On a machine without CUDA the plug-in also lets SGLang
keep them in ordinary memory.
"""

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.managers.io_struct import BeginWeightUpdateReqOutput
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from nanoslime.rollout.weight_check import ExpectedTensors, Named, checkpoint_shapes
from nanoslime.types import RunError

_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
_MANAGER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_COLLECT_EXPERTS = (
    "sglang.srt.managers.scheduler_components.batch_result_processor"
    ".SchedulerBatchResultProcessor._maybe_collect_routed_experts"
)
_PIN_MEMORY = "sglang.srt.mem_cache.pool_host.common._cuda_host_register"

# Success and a message.
Result = tuple[bool, str]
# The function that a hook stands in for; the hook returns the same type.
Original = Callable[..., Any]


def register() -> None:
    """Install the hooks. SGLang calls it once in each of its processes."""
    guard = WeightGuard()
    hooks = {
        f"{_UPDATER}.update_weights_from_disk": guard.disk,
        f"{_UPDATER}.load_weights_from_distributed": guard.bucket,
        f"{_UPDATER}.update_weights_from_tensor": guard.bucket,
        f"{_UPDATER}.begin_weight_update": guard.begin,
        f"{_MANAGER}.begin_weight_update": guard.answer_begin,
        f"{_MANAGER}.end_weight_update": guard.answer_end,
        _COLLECT_EXPERTS: _collect_small_experts,
    }
    for target, hook in hooks.items():
        HookRegistry.register(target, hook, HookType.AROUND)
    if not torch.cuda.is_available():
        # SGLang pins the host's buffer for routed experts by a call of CUDA.
        HookRegistry.register(_PIN_MEMORY, _leave_unpinned, HookType.REPLACE)


def _leave_unpinned(*arguments: object) -> None:
    """Stands in for cudaHostRegister."""


def _collect_small_experts(original: Original, processor: Any, request: Any) -> None:
    original(processor, request)
    experts = request.routed_experts
    if experts is not None and experts.numel() and experts.max() < 256:
        request.routed_experts = experts.to(torch.uint8)


class WeightGuard:
    """Knows which tensors this process may receive, and which it has received in the session.

    SGLang has one weight updater for each model runner of a process; both facts are
    kept by the id() of the updater.
    """

    def __init__(self) -> None:
        self._expected: dict[int, ExpectedTensors] = {}
        self._received: dict[int, set[str]] = {}

    def begin(self, original: Original, updater: Any) -> None:
        self._expected_by(updater)
        self._received[id(updater)] = set()
        original(updater)

    def answer_begin(self, original: Original, manager: Any, request: Any) -> Any:
        try:
            answer = original(manager, request)
        except (OSError, ValueError, RunError) as e:
            message = f"tensor names cannot be checked: {e}"
            return BeginWeightUpdateReqOutput(success=False, message=message)
        if answer.success:
            expected = [self._expected[updater] for updater in self._received]
            num_expected = sum(len(tensors.required) for tensors in expected)
            answer.message = f"{num_expected} tensors expected"
        return answer

    def bucket(
        self, original: Original, updater: Any, named_tensors: Any, **options: Any
    ) -> Result:
        """Load one bucket of the session, or refuse the whole of it.

        `named_tensors` are (name, tensor) pairs, or a flat tensor with the metadata of
        its parts. SGLang calls this after the broadcasts were received, so that a
        refusal does not leave their sender waiting.
        """
        received = _names_and_shapes(named_tensors)
        seen = self._received.setdefault(id(updater), set())
        problem = self._expected_by(updater).first_problem(received, seen)
        if problem:
            return False, f"refused: {problem}"
        try:
            success, message = original(updater, named_tensors, **options)
        except Exception as e:
            # Whatever a loader raises would end the scheduler process.
            return False, f"the weights are a mixture of two versions: {type(e).__name__}: {e}"
        if success:
            seen.update(name for name, _ in received)
        return success, message

    def disk(
        self, original: Original, updater: Any, model_path: str, *args: Any, **kwargs: Any
    ) -> Result:
        try:
            expected = self._expected_by(updater)
            found = checkpoint_shapes(model_path)
        except (OSError, ValueError, RunError) as e:
            return False, f"refused {model_path}: {e}"
        problem = expected.first_problem(found.items()) or expected.missing(found)
        if problem:
            return False, f"refused {model_path}: {problem}"
        success, message = original(updater, model_path, *args, **kwargs)
        if success:
            message = f"{message} {len(found)} tensors checked."
        return success, message

    def answer_end(self, original: Original, manager: Any, request: Any) -> Any:
        answer = original(manager, request)
        sessions = self._received
        self._received = {}
        if not answer.success:
            return answer
        for updater, received in sessions.items():
            problem = self._expected[updater].missing(received)
            if problem:
                answer.success = False
                answer.message = f"refused: {problem}; the weights are a mixture of two versions"
        return answer

    def _expected_by(self, updater: Any) -> ExpectedTensors:
        """The tensors of the model that the server was started from.

        They are read the first time, before an update changes the path that the updater
        knows.
        """
        if id(updater) not in self._expected:
            path = updater.model_config.model_path
            self._expected[id(updater)] = ExpectedTensors.of_checkpoint(path)
        return self._expected[id(updater)]


def _names_and_shapes(named_tensors: Any) -> list[Named]:
    if isinstance(named_tensors, dict):
        return [(part.name, tuple(part.shape)) for part in named_tensors["metadata"]]
    return [(name, tuple(tensor.shape)) for name, tensor in named_tensors]
