"""SGLang as a server process that this process owns. The same code on CPU and CUDA."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nanoslime.config.rollout import RolloutConfig
from nanoslime.memory import COLOCATED_MEM_FRACTION
from nanoslime.models.shape import ModelShape
from nanoslime.processes.child import ChildProcess
from nanoslime.processes.ports import require_free_port
from nanoslime.rollout.engines.sglang_client import SGLangEngine
from nanoslime.types import RunError

# Files of sglang/srt/models that a text model of ours needs; importing all 200 takes half a minute.
_MODEL_FILES = (
    "llama",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "utils",
    "registry",
    "__init__",
)


@dataclass(kw_only=True)
class SGLangServer:
    """One SGLang server process and all that it starts: `start()` gives the engine, `close()` ends it all.

    Raises RunError for an option in config.sglang that is set elsewhere.
    """

    name: str
    model_path: str
    config: RolloutConfig
    dtype: str
    device: Literal["cpu", "cuda"]
    host: str
    port: int
    log: Path
    seed: int
    cpu_core: int | None = None  # where the one thread of a CPU engine computes
    gpu_ids: Sequence[int] = ()  # the GPUs that it sees
    routed_experts: bool = False  # whether its engine reports them
    colocated: bool = False  # gives its memory to trainers on the same GPUs and takes it back
    process: ChildProcess | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        place = {
            "model_path": self.model_path,
            "host": self.host,
            "port": self.port,
            "device": self.device,
        }
        ours = place | {"tp_size": self.config.engine_tp_size, "weight_version": "0"}
        ours["enable_return_routed_experts"] = self.routed_experts
        if taken := sorted(ours.keys() & self.config.sglang):
            raise RunError(f"rollout.sglang.{taken[0]} is set by nanoslime itself; remove it")
        options = ours | {"dtype": self.dtype, "random_seed": self.seed}
        self.env = os.environ | {
            "NO_PROXY": "*",
            "no_proxy": "*",
        }  # SGLang calls itself over HTTP to warm up
        if self.device == "cpu":
            options |= _CPU_OPTIONS
            core = min(os.sched_getaffinity(0)) if self.cpu_core is None else self.cpu_core
            self.env |= _cpu_environment(self.model_path, core)
        elif self.gpu_ids:
            self.env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self.gpu_ids))
        if self.device == "cuda" and self.colocated:
            options |= {"enable_memory_saver": True, "mem_fraction_static": COLOCATED_MEM_FRACTION}
        self.command = [
            sys.executable,
            "-m",
            "sglang.launch_server",
            *_flags(options | self.config.sglang),
        ]

    def start(self, deadline_s: float) -> SGLangEngine:
        """Start the process and wait until it generates. RunError names engine, what was awaited and log."""
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
        )
        self.process = ChildProcess(f"engine {self.name}", self.command, self.env, self.log)
        self.process.wait_until(engine.health, f"200 from {engine.url}/health", deadline_s)
        return engine

    def close(self) -> None:
        if self.process is not None:
            self.process.close()


# Defaults of an engine on CPU, with a model of some megabytes in mind.
_CPU_OPTIONS = {
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "disable_overlap_schedule": True,
    "cuda_graph_backend_decode": "disabled",
    "cuda_graph_backend_prefill": "disabled",
    "max_total_tokens": 65536,
    "max_running_requests": 256,
    "sleep_on_idle": True,  # an idle scheduler otherwise spins on its core
}


def _cpu_environment(model_path: str, core: int) -> dict[str, str]:
    stubs = Path(__file__).parents[1] / "sglang_stubs"
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(stubs), os.environ.get("PYTHONPATH")])),
        "SGLANG_DISABLED_MODEL_ARCHS": ",".join(_model_files_to_skip(model_path)),
        "SGLANG_USE_CPU_ENGINE": "1",
        "SGLANG_CPU_OMP_THREADS_BIND": str(core),
        "OMP_NUM_THREADS": "1",
    }


def _model_files_to_skip(model_path: str) -> list[str]:
    """Architecture files that SGLang need not import; none for an architecture that is not in our list."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise RunError(
            "rollout.engine=sglang: sglang is not installed; install it or use engine=embedded"
        )
    if (
        json.loads((Path(model_path) / "config.json").read_text()).get("model_type")
        not in _MODEL_FILES
    ):
        return []
    files = Path(spec.submodule_search_locations[0], "srt", "models").glob("*.py")
    return sorted({file.stem for file in files} - set(_MODEL_FILES))


def _flags(options: dict[str, Any]) -> Iterator[str]:
    """--name value for each option: nothing for None or False, the flag for True, all values of a list."""
    for name, value in options.items():
        if value is None or value is False:
            continue
        yield f"--{name.replace('_', '-')}"
        if isinstance(value, dict):
            yield json.dumps(value)
        elif value is not True:
            yield from map(str, value if isinstance(value, list | tuple) else [value])
