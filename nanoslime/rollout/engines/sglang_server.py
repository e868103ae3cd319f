"""SGLang as a server process that this process owns. The code is the same on CPU and
CUDA."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanoslime.config import RolloutConfig
from nanoslime.engine_kind import EngineStart
from nanoslime.models.shape import ModelShape
from nanoslime.processes.child import ChildProcess
from nanoslime.processes.ports import free_port, require_free_port
from nanoslime.rollout.engines.sglang import COLOCATED_MEM_FRACTION
from nanoslime.rollout.engines.sglang_client import SGLangEngine
from nanoslime.types import RunError

# Stand-ins for packages that SGLang imports and that do not exist for a CPU.
_STUBS = Path(__file__).parents[1] / "sglang_stubs"

# Files of sglang/srt/models that our text models need; importing all 200 takes half a
# minute.
_MODEL_FILES = {
    "llama",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "utils",
    "registry",
    "__init__",
}

# Defaults of an engine on a CPU, for a model of some megabytes.
_CPU_OPTIONS = {
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "disable_overlap_schedule": True,
    "cuda_graph_backend_decode": "disabled",
    "cuda_graph_backend_prefill": "disabled",
    "max_total_tokens": 65536,
    "max_running_requests": 256,
    # Otherwise an idle scheduler keeps its core busy.
    "sleep_on_idle": True,
}


def owner(start: EngineStart) -> SGLangServer:
    """The server of an engine of a run, at a free port.

    On a CPU each engine computes on one core; engine 0 has the last one, engine 1 the
    one before.
    """
    config = start.config
    cores = sorted(os.sched_getaffinity(0))
    return SGLangServer(
        name=f"engine-{start.index}",
        model_path=str(start.model_dir),
        config=config.rollout,
        dtype=config.model.dtype,
        device=start.device,
        host=start.host,
        port=free_port(start.host),
        log=start.log,
        seed=config.seed * 1000 + start.index,
        log_level=config.log_level,
        cpu_core=cores[-1 - start.index % len(cores)],
        gpu_ids=start.gpu_ids,
        colocated=config.cluster.colocate,
        trust_remote_code=config.model.trust_remote_code,
        routed_experts=config.training.routing_replay == "R3",
        control_deadline_s=config.weight_sync.deadline_s,
    )


@dataclass(kw_only=True)
class SGLangServer:
    """One SGLang server process and everything that it starts.

    `start()` gives the engine and `close()` ends all of it. Raises RunError for an
    option in config.sglang that nanoslime sets itself.
    """

    name: str
    model_path: str
    config: RolloutConfig
    dtype: str
    # "cuda" or "cpu".
    device: str
    host: str
    port: int
    log: Path
    seed: int
    log_level: str = "info"
    # The core on which the one thread of a CPU engine computes.
    cpu_core: int | None = None
    # The GPUs that the server sees.
    gpu_ids: Sequence[int | str] = ()
    # Whether the engine reports the experts of each token.
    routed_experts: bool = False
    # How long a control call of a weight sync may take.
    control_deadline_s: float = 300.0
    # Whether the engine gives its memory to trainers on the same GPUs and takes it back.
    colocated: bool = False
    # Whether code of the checkpoint may run in it: its configuration, its tokenizer.
    trust_remote_code: bool = False
    process: ChildProcess | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        shape = ModelShape.read(self.model_path)
        # SGLang does not see the context of a config that its rope scaling stretches.
        self._stretched_context = None
        if shape.context_length > shape.max_position_embeddings:
            self._stretched_context = shape.context_length
        self.command = [sys.executable, "-m", "sglang.launch_server", *_flags(self._options())]
        self.env = os.environ | self._environment()

    def start(self, deadline_s: float) -> SGLangEngine:
        """Start the process and wait until it generates.

        Raises RunError naming the engine, what was awaited, and the log.
        """
        require_free_port(self.host, self.port, f"engine {self.name}")
        shape = ModelShape.read(self.model_path)
        engine = SGLangEngine(
            name=self.name,
            url=f"http://{self.host}:{self.port}",
            log=str(self.log),
            vocab_size=shape.vocab_size,
            experts_of=shape if self.routed_experts else None,
            world_size=self.config.engine_tp_size,
            request_deadline_s=self.config.request_deadline_s,
            control_deadline_s=self.control_deadline_s,
        )
        self.process = ChildProcess(f"engine {self.name}", self.command, self.env, self.log)
        self.process.wait_until(engine.health, f"200 from {engine.url}/health", deadline_s)
        return engine

    def close(self) -> None:
        if self.process is not None:
            self.process.close()

    def _options(self) -> dict[str, Any]:
        """The server's options by SGLang's names; the later ones take precedence."""
        fixed = {
            "model_path": self.model_path,
            "host": self.host,
            "port": self.port,
            "device": self.device,
            "tp_size": self.config.engine_tp_size,
            "weight_version": "0",
            "enable_return_routed_experts": self.routed_experts,
            "trust_remote_code": self.trust_remote_code,
        }
        for name in sorted(self.config.sglang):
            if name in fixed:
                raise RunError(f"rollout.sglang.{name} is set by nanoslime itself; remove it")
        options = {**fixed, "dtype": self.dtype, "random_seed": self.seed}
        options["log_level"] = self.log_level
        if self._stretched_context:
            options["context_length"] = self._stretched_context
        # The trainer's logprobs are those of float32 logits.
        options["enable_fp32_lm_head"] = True
        if self.device == "cpu":
            options.update(_CPU_OPTIONS)
        if self.device == "cuda" and self.colocated:
            options["enable_memory_saver"] = True
            options["mem_fraction_static"] = COLOCATED_MEM_FRACTION
        options.update(self.config.sglang)
        return options

    def _environment(self) -> dict[str, str]:
        """What the server's environment has beyond ours."""
        # SGLang warms up by calling itself over HTTP.
        environment = {"NO_PROXY": "*", "no_proxy": "*"}
        if self._stretched_context:
            environment["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
        if self.device == "cpu":
            environment.update(_cpu_environment(self.model_path, self.cpu_core))
        elif self.gpu_ids:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu) for gpu in self.gpu_ids)
        return environment


def _cpu_environment(model_path: str, core: int | None) -> dict[str, str]:
    if core is None:
        core = min(os.sched_getaffinity(0))
    path = [str(_STUBS)]
    ours = os.environ.get("PYTHONPATH")
    if ours:
        path.append(ours)
    return {
        "PYTHONPATH": os.pathsep.join(path),
        "SGLANG_DISABLED_MODEL_ARCHS": ",".join(_model_files_to_skip(model_path)),
        "SGLANG_USE_CPU_ENGINE": "1",
        "SGLANG_CPU_OMP_THREADS_BIND": str(core),
        "OMP_NUM_THREADS": "1",
    }


def _model_files_to_skip(model_path: str) -> list[str]:
    """Files of sglang/srt/models that the server need not import.

    There are none for an architecture that is not in `_MODEL_FILES`. Raises RunError
    where SGLang is not installed.
    """
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise RunError(
            "rollout.engine=sglang: sglang is not installed; install it or use engine=embedded"
        )
    model_config = json.loads((Path(model_path) / "config.json").read_text())
    if model_config.get("model_type") not in _MODEL_FILES:
        return []
    models = Path(spec.submodule_search_locations[0], "srt", "models")
    return sorted({file.stem for file in models.glob("*.py")} - _MODEL_FILES)


def _flags(options: Mapping[str, Any]) -> Iterator[str]:
    """--name value for each option: nothing for None or False, the flag alone for True,
    every value of a list, JSON for a dict."""
    for name, value in options.items():
        if value is None or value is False:
            continue
        yield f"--{name.replace('_', '-')}"
        if value is True:
            continue
        if isinstance(value, dict):
            yield json.dumps(value)
        elif isinstance(value, list | tuple):
            yield from (str(item) for item in value)
        else:
            yield str(value)
