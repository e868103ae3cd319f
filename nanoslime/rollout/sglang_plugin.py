"""Runs inside SGLang's own processes (its entry point group `sglang.srt.plugins`), never in ours.

Stock SGLang 0.5.23 answers success to a weight update with unknown names, loading nothing, and does not
notice missing ones. With this plug-in the tensors of an update, however they come, are those of the
checkpoint that the server was started from: an unknown or repeated name, or another shape, is refused before
anything is loaded, and a session (begin ... end) or a directory that lacks one is refused with the names. A
refusal is an error response (success false); the server goes on.

On a machine without CUDA it also lets SGLang keep the experts that its routers choose in ordinary memory.
"""

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.managers.io_struct import BeginWeightUpdateReqOutput
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from nanoslime.rollout.weight_check import Shapes, checkpoint_shapes, first_problem, missing
from nanoslime.types import RunError

_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
_PIN_MEMORY = "sglang.srt.mem_cache.pool_host.common._cuda_host_register"
_MANAGER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"

Result = tuple[bool, str]  # success, message
Original = Callable[..., Any]  # what a hook stands in for: it returns the same


def register() -> None:
    """Install the hooks. SGLang calls it once in each of its processes."""
    guard = WeightGuard()
    for target, hook in (
        (f"{_UPDATER}.update_weights_from_disk", guard.disk),
        (f"{_UPDATER}.load_weights_from_distributed", guard.bucket),
        (f"{_UPDATER}.update_weights_from_tensor", guard.bucket),
        (f"{_UPDATER}.begin_weight_update", guard.begin),
        (f"{_MANAGER}.begin_weight_update", guard.answer_begin),
        (f"{_MANAGER}.end_weight_update", guard.answer_end),
    ):
        HookRegistry.register(target, hook, HookType.AROUND)
    if (
        not torch.cuda.is_available()
    ):  # the host's buffer for routed experts is pinned by a call of CUDA
        HookRegistry.register(_PIN_MEMORY, lambda *_: None, HookType.REPLACE)


class WeightGuard:
    """What this process's weight updaters (one per model runner) may receive, and what they have so far."""

    def __init__(self) -> None:
        self._expected: dict[int, Shapes] = {}
        self._received: dict[int, set[str]] = {}

    def begin(self, original: Original, updater: Any) -> None:
        self._expect(updater)
        self._received[id(updater)] = set()
        original(updater)

    def answer_begin(self, original: Original, manager: Any, request: Any) -> Any:
        try:
            answer = original(manager, request)
        except (OSError, ValueError, RunError) as e:
            return BeginWeightUpdateReqOutput(
                success=False, message=f"tensor names cannot be checked: {e}"
            )
        if answer.success:
            answer.message = (
                f"{sum(len(self._expected[u]) for u in self._received)} tensors expected"
            )
        return answer

    def bucket(
        self, original: Original, updater: Any, named_tensors: Any, **options: Any
    ) -> Result:
        """Load one bucket of the session (named tensors, or flat with metadata), or refuse the whole of it.

        Called after the broadcasts were received, so that a refusal does not leave their sender waiting.
        """
        if isinstance(named_tensors, dict):
            received = [(meta.name, tuple(meta.shape)) for meta in named_tensors["metadata"]]
        else:
            received = [(name, tuple(tensor.shape)) for name, tensor in named_tensors]
        seen = self._received.setdefault(id(updater), set())
        if problem := first_problem(received, self._expect(updater), seen):
            return False, f"refused: {problem}"
        try:
            success, message = original(updater, named_tensors, **options)
        except Exception as e:  # whatever a loader raises would end the scheduler process
            return False, f"the weights are a mixture of two versions: {type(e).__name__}: {e}"
        if success:
            seen.update(name for name, _ in received)
        return success, message

    def disk(
        self, original: Original, updater: Any, model_path: str, *args: Any, **kwargs: Any
    ) -> Result:
        try:
            expected, found = self._expect(updater), checkpoint_shapes(model_path)
        except (OSError, ValueError, RunError) as e:
            return False, f"refused {model_path}: {e}"
        if problem := first_problem(found.items(), expected) or missing(expected, found):
            return False, f"refused {model_path}: {problem}"
        success, message = original(updater, model_path, *args, **kwargs)
        return success, f"{message} {len(found)} tensors checked." if success else message

    def answer_end(self, original: Original, manager: Any, request: Any) -> Any:
        answer = original(manager, request)
        sessions, self._received = self._received, {}
        for updater, received in sessions.items() if answer.success else ():
            if problem := missing(self._expected[updater], received):
                answer.success = False
                answer.message = f"refused: {problem}; the weights are a mixture of two versions"
        return answer

    def _expect(self, updater: Any) -> Shapes:
        """Those of the checkpoint the server started from; first read before an update changes the path."""
        if id(updater) not in self._expected:
            self._expected[id(updater)] = checkpoint_shapes(updater.model_config.model_path)
        return self._expected[id(updater)]
