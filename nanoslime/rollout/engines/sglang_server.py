"""SGLang as a server process that this process owns. The code is the same on CPU and
CUDA."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nanoslime.engine_kind import EngineStart
from nanoslime.models.shape import ModelShape
from nanoslime.processes.child import ChildProcess
from nanoslime.processes.ports import free_port
from nanoslime.processes.shared_memory import announce, remove_names
from nanoslime.rollout.engines.sglang import COLOCATED_MEM_FRACTION
from nanoslime.rollout.engines.sglang_client import SGLangEngine, make_key
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


def _names_of_loads(server: ChildProcess) -> str:
    """How the files begin that SGLang leaves in /dev/shm: our plug-in has a server's processes name
    them so.
    """
    return f"sglang_loads_{server.pid}-"


class SGLangServer:
    """One SGLang server process of a run and everything that it starts.

    `start()` gives the engine and `close()` ends all of it. On a CPU each rank of an engine
    computes on one core; the first rank of engine 0 has the last one, the next the one before.
    """

    def __init__(self, start: EngineStart, port: int | None = None) -> None:
        """`port` is a free one unless it is given.

        Raises RunError for an option in rollout.sglang that nanoslime sets itself.
        """
        self._plan = start
        self._name = f"engine-{start.index}"
        self._port = port or free_port(start.host)
        self._shape = ModelShape.read(start.model_dir)
        # The key of all engines of the attempt, in its directory, whose user alone reads it.
        self._key_file = start.log.with_name("engine_key.yaml")
        self._reports_experts = start.config.training.routing_replay == "R3"
        # SGLang does not see the context of a config that its rope scaling stretches.
        self._stretched_context = None
        if self._shape.context_length > self._shape.max_position_embeddings:
            self._stretched_context = self._shape.context_length
        # Without -P a checkout that is the working directory would come before this code.
        server = [sys.executable, "-P", "-m", "sglang.launch_server"]
        self.command = [*server, "--config", str(self._key_file), *_flags(self._options())]
        self.env = os.environ | self._environment()
        self.process: ChildProcess | None = None

    def start(self, deadline_s: float) -> SGLangEngine:
        """Start the process and wait until it generates.

        Raises RunError naming the engine, what was awaited, and the log.
        """
        plan = self._plan
        engine = SGLangEngine(
            name=self._name,
            url=f"http://{plan.host}:{self._port}",
            log=str(plan.log),
            vocab_size=self._shape.vocab_size,
            experts_of=self._shape if self._reports_experts else None,
            world_size=plan.config.rollout.engine_tp_size,
            request_deadline_s=plan.config.rollout.request_deadline_s,
            control_deadline_s=plan.config.weight_sync.deadline_s,
            key_file=self._key_file,
        )
        make_key(self._key_file)
        self.process = ChildProcess(f"engine {self._name}", self.command, self.env, plan.log)
        announce(_names_of_loads(self.process))
        self.process.wait_until(engine.health, f"200 from {engine.url}/health", deadline_s)
        return engine

    def close(self) -> None:
        if self.process is not None:
            self.process.close()
            remove_names(_names_of_loads(self.process))

    def _options(self) -> dict[str, Any]:
        """The server's options by SGLang's names; the later ones take precedence."""
        plan = self._plan
        config = plan.config
        fixed = {
            "model_path": str(plan.model_dir),
            "host": plan.host,
            "port": self._port,
            "device": plan.device,
            "tp_size": config.rollout.engine_tp_size,
            "weight_version": "0",
            "enable_return_routed_experts": self._reports_experts,
            "trust_remote_code": config.model.trust_remote_code,
        }
        for name in sorted(config.rollout.sglang):
            if name in fixed:
                raise RunError(f"rollout.sglang.{name} is set by nanoslime itself; remove it")
        options = {**fixed, "dtype": config.model.dtype, "log_level": config.log_level}
        # No two engines and no two runs sample alike.
        options["random_seed"] = config.seed * 1000 + plan.index
        if self._stretched_context:
            options["context_length"] = self._stretched_context
        # The trainer's logprobs are those of float32 logits.
        options["enable_fp32_lm_head"] = True
        if plan.device == "cpu":
            options.update(_CPU_OPTIONS)
        if plan.device == "cuda" and config.cluster.colocate:
            options["enable_memory_saver"] = True
            options["mem_fraction_static"] = COLOCATED_MEM_FRACTION
        options.update(config.rollout.sglang)
        return options

    def _environment(self) -> dict[str, str]:
        """What the server's environment has beyond ours."""
        # SGLang warms up by calling itself over HTTP. Its server in Rust knows no key.
        environment = {"NO_PROXY": "*", "no_proxy": "*", "SGLANG_RUST_SERVER": "0"}
        if self._stretched_context:
            environment["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
        plan = self._plan
        if plan.device == "cpu":
            environment.update(_cpu_environment(plan))
        elif plan.gpu_ids:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu) for gpu in plan.gpu_ids)
        return environment


def _cpu_environment(plan: EngineStart) -> dict[str, str]:
    cores = sorted(os.sched_getaffinity(0))
    num_ranks = plan.config.rollout.engine_tp_size
    ranks = range(plan.index * num_ranks, (plan.index + 1) * num_ranks)
    path = [str(_STUBS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(path),
        "SGLANG_DISABLED_MODEL_ARCHS": ",".join(_model_files_to_skip(plan.model_dir)),
        "SGLANG_USE_CPU_ENGINE": "1",
        "SGLANG_CPU_OMP_THREADS_BIND": "|".join(str(cores[-1 - r % len(cores)]) for r in ranks),
        # Two ranks would use NCCL wherever it is found, and it needs CUDA.
        "SGLANG_NCCL_SO_PATH": str(_STUBS / "no-nccl.so"),
        "OMP_NUM_THREADS": "1",
    }


def _model_files_to_skip(model_dir: Path) -> list[str]:
    """Files of sglang/srt/models that the server need not import.

    There are none for an architecture that is not in `_MODEL_FILES`. Raises RunError
    where SGLang is not installed.
    """
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise RunError(
            "rollout.engine=sglang: sglang is not installed; install it or use engine=embedded"
        )
    model_config = json.loads((model_dir / "config.json").read_text())
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
        if value is not True:
            values = value if isinstance(value, list | tuple) else [value]
            yield from (json.dumps(one) if isinstance(one, dict) else str(one) for one in values)
