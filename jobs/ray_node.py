"""Ray on one node, as text: the `ray start` of a head or worker, and its environment."""

import json
import os
import resource
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from jobs.cluster_env import ClusterEnv
from nanoslime.layout import Layout

STARTED = "Ray runtime started."
"""What `ray start` (2.60) prints once its raylet is registered with the head."""
_CPU_OBJECT_STORE_BYTES = 200_000_000
# FlashInfer and SGLang make folders of their own below these.
_CACHES = (
    ("TRITON_CACHE_DIR", "triton"),
    ("TORCHINDUCTOR_CACHE_DIR", "inductor"),
    ("FLASHINFER_WORKSPACE_BASE", "flashinfer"),
    ("SGLANG_CACHE_DIR", "sglang"),
    ("CUDA_CACHE_PATH", "cuda"),
    ("HF_MODULES_CACHE", "hf_modules"),
)
# How long Ray's processes linger once the head is gone.
_RECONNECT_TIMEOUT_S = 30
# On open files, processes, and locked memory, which InfiniBand needs.
_LIMITS = (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_MEMLOCK)


def raise_limits() -> None:
    """Raises this process's limits, which its children inherit, as far as they go."""
    for limit in _LIMITS:
        _, hard = resource.getrlimit(limit)
        with suppress(OSError, ValueError):
            resource.setrlimit(limit, (hard, hard))


def environment(
    base: Mapping[str, str],
    token: Path,
    scratch: Path,
    caches: Path | None = None,
    venv: Path | None = None,
) -> dict[str, str]:
    """The environment of `ray start` and of the driver, and so of all that they start.

    venv: the copy of the virtual environment on this node; None without one.

    What they leave in TMPDIR goes with the scratch directory, which nobody else can enter. What
    they compile is kept in `caches`, unless `base` says otherwise.
    """
    kept = {name: os.fspath(caches / folder) for name, folder in _CACHES} if caches else {}
    # Ray would take this token rather than that of the file.
    base = {name: value for name, value in base.items() if name != "RAY_AUTH_TOKEN"}
    return {
        **kept,
        # Ray's own default is 15: trainers and engines would wait for whatever else runs there.
        "RAY_worker_niceness": "0",
        **base,
        **cuda_home(base, venv or Path(sys.prefix)),
        **activated(base, venv),
        "TMPDIR": str(scratch),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_gcs_rpc_server_reconnect_timeout_s": str(_RECONNECT_TIMEOUT_S),
        # Else the head keeps 3.5 kB of each of the last 100,000 calls, for a dashboard.
        "RAY_task_events_report_interval_ms": "0",
        "PYTHONUNBUFFERED": "1",
        # Compute nodes have no network: a file that submission did not find is an error,
        # not a long wait.
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }


def keep_logs(scratch: Path, target: Path) -> None:
    """Packs Ray's own logs, to which its errors point, from the scratch directory of a node into
    `target`.tar.gz; nothing where Ray did not start.
    """
    folder = scratch / "ray" / "session_latest" / "logs"
    if folder.is_dir():
        shutil.make_archive(os.fspath(target), "gztar", folder)


def activated(base: Mapping[str, str], venv: Path | None) -> dict[str, str]:
    """What activates a virtual environment."""
    if venv is None:
        return {}
    path = os.pathsep.join(filter(None, (str(venv / "bin"), base.get("PATH", ""))))
    return {"VIRTUAL_ENV": str(venv), "PATH": path}


def cuda_home(base: Mapping[str, str], venv: Path) -> dict[str, str]:
    """CUDA_HOME of the environment's own toolkit, where the machine offers none.

    SGLang compiles some kernels when it first uses them. The CPU environment has no compiler.
    """
    own = venv / "lib" / "python3.12" / "site-packages" / "nvidia" / "cu13"
    has_toolkit = "CUDA_HOME" in base or shutil.which("nvcc", path=base.get("PATH", ""))
    if has_toolkit or not (own / "bin" / "nvcc").is_file():
        return {}
    return {"CUDA_HOME": str(own)}


def bin_of(venv: Path | None) -> Path:
    """Where the programs of Ray and of the driver lie; venv: as in `environment`."""
    return venv / "bin" if venv else Path(sys.executable).parent


def start_command(
    env: ClusterEnv, layout: Layout, scratch: Path, venv: Path | None, options: list[str]
) -> list[str]:
    """The `ray start` of one node.

    venv: as in `environment`. options: of the head, or a worker's --address. The kernel chooses all
    ports that are not named.
    """
    role = layout.roles(env.node_index).replace("+", "_") or "idle"
    slots = layout.slots_per_node
    if layout.device == "cuda":
        sizes = [f"--num-cpus={slots}", f"--num-gpus={slots}"]
    else:
        sizes = ["--num-cpus=1", f"--object-store-memory={_CPU_OBJECT_STORE_BYTES}"]
    return [
        os.fspath(bin_of(venv) / "ray"),
        "start",
        "--block",
        f"--node-ip-address={env.address}",
        *sizes,
        f"--resources={json.dumps({'slot': slots})}",
        f"--labels=nanoslime-node={env.node_index},nanoslime-role={role}",
        # Ray opens this one to all users; the one around it stays closed.
        f"--temp-dir={scratch / 'ray'}",
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--dashboard-agent-listen-port=0",
        "--include-log-monitor=false",
        "--disable-usage-stats",
        *options,
    ]
