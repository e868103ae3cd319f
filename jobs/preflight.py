"""What an agent makes sure of on its node before it starts Ray."""

import json
import os
import sys

from jobs.cluster_env import ClusterEnv
from nanoslime.processes.command import ask
from nanoslime.types import RunError

_CUDA_PROBE = """
import json, torch
from torch import cuda
driver = getattr(getattr(torch, "_C", None), "_cuda_getDriverVersion", int)()
print(json.dumps([torch.version.cuda, driver, cuda.is_available(), cuda.device_count()]))
"""
_MAX_ERROR_CHARS = 200


def check_cores(env: ClusterEnv) -> None:
    """RunError where this process may use fewer cores than its node was given."""
    allowed = len(os.sched_getaffinity(0))
    given = min(env.cpus, os.cpu_count() or 1)
    if allowed < given:
        raise RunError(
            f"the agent of {env.node_name} is pinned to {allowed} of the {given} cores "
            f"it was given; "
            f"start it with srun --cpus-per-task={env.cpus}, without taskset or --cpu-bind"
        )


def check_gpus(env: ClusterEnv, needed: int, deadline_s: float = 180.0) -> None:
    """RunError unless torch, in its own process, sees exactly the GPUs of the plan."""
    command = [sys.executable, "-c", _CUDA_PROBE]
    done = ask(command, deadline_s, who=f"torch on {env.node_name}")
    errors = " ".join(done.stderr.split())[-_MAX_ERROR_CHARS:]
    if done.returncode:
        raise RunError(f"torch of {sys.executable} does not start on {env.node_name}: {errors}")
    built_for, driver, available, count = json.loads(done.stdout.splitlines()[-1])
    check_driver(env.node_name, built_for, driver)
    if not available:
        build = f"for CUDA {built_for}" if built_for else "without CUDA"
        raise RunError(
            f"torch of {sys.executable} sees no CUDA on {env.node_name}: it was built {build}. "
            "Make the environment with `bash env/run.sh --target cuda true`, "
            f"or look at nvidia-smi there. {errors}"
        )
    if count != needed:
        raise RunError(
            f"{env.node_name} shows {count} GPUs, the plan needs {needed}; check --gpus-per-node"
        )


def check_driver(node_name: str, built_for: str | None, driver: int) -> None:
    """RunError where a node's driver is older than the CUDA that torch was built for.

    `driver`: the newest CUDA that it runs, as 12020 for 12.2; 0 without a driver. One of the
    same major release will do.
    """
    if not driver or not built_for:
        return
    major = int(built_for.partition(".")[0])
    if driver // 1000 < major:
        raise RunError(
            f"the NVIDIA driver of {node_name} runs CUDA {driver // 1000}.{driver % 1000 // 10} "
            f"at most, and the environment's torch needs CUDA {built_for}; update the driver, "
            "or choose nodes that have a newer one"
        )
