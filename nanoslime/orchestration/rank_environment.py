"""What the environment of a rank or an engine has beyond its job's; the user's values win."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

NCCL_MEMORY = ("NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE")
INTERFACE = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
# torch 2.13 records the collectives of NCCL and writes them, by default, when one takes too long;
# also when something comes through a pipe that has the number of the rank and ".pipe" in its name.
_FLIGHT_RECORDER = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_PIPE_FILE")


def nccl_defaults(environ: Mapping[str, str], sglang: Mapping[str, Any]) -> dict[str, str]:
    """NCCL's memory settings as SGLang 0.5.23 makes them for its engines.

    Ranks and engines share a communicator when weights are sent, and have to agree.
    `sglang` are the options in rollout.sglang; what they need is on, whatever the user says.
    """
    symmetric = bool(sglang.get("enable_symm_mem"))
    nvls = symmetric or bool(sglang.get("enable_nccl_nvls"))
    values = dict(zip(NCCL_MEMORY, (str(int(symmetric)), str(int(nvls))), strict=True))
    return {name: on for name, on in values.items() if on == "1" or name not in environ}


def flight_recorder_files(environ: Mapping[str, str], logs: Path) -> dict[str, str]:
    """Where a rank's flight recorder writes: `logs`/nccl-<rank>."""
    return {name: f"{logs}/nccl-" for name in _FLIGHT_RECORDER if name not in environ}


def interface_names(environ: Mapping[str, str], interface: str) -> dict[str, str]:
    """The variables that tie gloo and NCCL to `interface`; none where it is empty."""
    if not interface:
        return {}
    return {name: interface for name in INTERFACE if name not in environ}


def interface_of(address: str, addresses: Mapping[str, list[str]]) -> str:
    """The interface that has `address`, or empty. `addresses`: those of each interface.

    All of 127.0.0.0/8 belongs to the loopback interface, which names 127.0.0.1 alone.
    """
    for name, own in addresses.items():
        is_loopback = any(one.startswith("127.") for one in own)
        if address in own or (is_loopback and address.startswith("127.")):
            return name
    return ""


def num_threads(users: str | None, num_cores: int, num_ranks: int) -> int:
    """A rank's share of the cores of its machine, unless the user has set OMP_NUM_THREADS.

    Ray gives an actor one thread, with which an optimizer on the host crawls.
    """
    if users and users.isdecimal() and int(users) > 0:
        return int(users)
    return max(1, num_cores // max(1, num_ranks))
