"""The GPUs of a node: as many as planned, a driver that is new enough, and no broken memory."""

import json
import sys
from collections.abc import Mapping

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
_ECC_QUERY = "--query-gpu=index,ecc.errors.uncorrected.volatile.total"
# Some GPUs and drivers do not know it. A row that is pending waits for a reset of the GPU.
_ROWS_QUERY = "--query-remapped-rows=gpu_bus_id,remapped_rows.pending,remapped_rows.failure"
# The rest is a count, or words about a GPU that is lost or needs a reset.
_NO_ERRORS = ("0", "N/A", "[N/A]", "[Not Supported]")
_YES = ("yes", "1")


def check_gpus(env: ClusterEnv, needed: int, deadline_s: float = 180.0) -> str:
    """How many GPUs there are, and the CUDA of the driver.

    RunError unless torch, in its own process, sees exactly the GPUs of the plan.
    """
    # Without -P the working directory's modules would come first.
    command = [sys.executable, "-P", "-c", _CUDA_PROBE]
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
    return f"{count} GPUs, driver for CUDA {_cuda(driver)}, torch for CUDA {built_for}"


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
            f"the NVIDIA driver of {node_name} runs CUDA {_cuda(driver)} at most, "
            f"and the environment's torch needs CUDA {built_for}; update the driver, "
            "or choose nodes that have a newer one"
        )


def check_ecc(node_name: str, environ: Mapping[str, str], deadline_s: float) -> str:
    """How many of the job's GPUs have been asked; nothing where there is no nvidia-smi.

    RunError where the memory of one of them waits for a reset or cannot be mended, and where
    nvidia-smi fails or does not answer. An error that was not corrected has ended the program that
    had it, and is only told.
    """
    chosen = environ.get("CUDA_VISIBLE_DEVICES", "")
    options = ["--format=csv,noheader"]
    if chosen and not chosen.startswith("MIG"):
        options.append(f"--id={chosen}")
    who = f"nvidia-smi of {node_name}"
    try:
        done = ask(["nvidia-smi", _ECC_QUERY, *options], deadline_s, who=who)
        rows = ask(["nvidia-smi", _ROWS_QUERY, *options], deadline_s, who=who)
    except FileNotFoundError:
        return ""
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())[-_MAX_ERROR_CHARS:]
        raise RunError(
            f"nvidia-smi of {node_name} fails with exit code {done.returncode}: {said}; "
            "the node's driver or a GPU needs its administrator"
        )
    answers = dict(line.split(", ", 1) for line in done.stdout.splitlines() if ", " in line)
    told = {gpu: said for gpu, said in answers.items() if said not in _NO_ERRORS}
    bad = [f"GPU {gpu}: {said}" for gpu, said in told.items() if not said.isdigit()]
    for line in rows.stdout.splitlines() if rows.returncode == 0 else ():
        gpu, *rest = line.lower().split(", ")
        states = zip(("pending", "failed"), rest, strict=False)
        bad += [f"GPU {gpu}: remapped rows {state}" for state, is_so in states if is_so in _YES]
    if bad:
        raise RunError(
            f"{node_name} has GPUs with broken memory ({', '.join(bad)}); "
            "its administrator has to reset or to replace them"
        )
    errors = ", ".join(f"{count} on GPU {gpu}" for gpu, count in told.items())
    return (
        f"{len(answers)} GPUs, uncorrected errors since the driver was loaded: {errors or 'none'}"
    )


def _cuda(version: int) -> str:
    """12020 -> 12.2"""
    return f"{version // 1000}.{version % 1000 // 10}"
