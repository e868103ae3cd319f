"""The Ray cluster of a run: that of the node agents, or one of this process's own."""

import logging
import os
import time
from contextlib import chdir
from pathlib import Path
from typing import Any

import ray
from ray._raylet import AuthenticationTokenLoader, Config

from nanoslime.types import MachineFailure

_CODE = Path(__file__).parents[3]
NODE_LABEL = "nanoslime-node"
# The Ray resource that stands for a GPU on nodes that have none.
SLOT = "slot"


def connect(head: dict[str, Any], num_nodes: int, deadline_s: float) -> None:
    """Connects to the cluster of the node agents; waits until every node has joined."""
    # Ray puts the directory of this call before all others in the path of its workers.
    with chdir(_CODE):
        _init(address=head["ray_address"], _node_ip_address=head["node_ip"])
    end = time.monotonic() + deadline_s
    while len(joined := _joined_nodes()) < num_nodes:
        if time.monotonic() > end:
            missing = [node for node in range(num_nodes) if str(node) not in joined]
            raise MachineFailure(
                f"nodes {missing} are not in the Ray cluster at {head['ray_address']} "
                f"after {deadline_s:.0f}s"
            )
        time.sleep(0.2)


def _joined_nodes() -> set[str]:
    """The plan's numbers of the nodes that are alive in the cluster."""
    return {node["Labels"].get(NODE_LABEL) for node in ray.nodes() if node["Alive"]}


def start_local(num_slots: int, device: str, token: Path) -> None:
    """Starts a Ray of this process's own, with one node, which is node 0 of the plan.

    `python -m nanoslime.train --num-gpus N` runs on it. It ends with this process. Every user of
    this machine reaches its ports, and needs the secret in the file `token`.
    """
    os.environ.pop("RAY_AUTH_TOKEN", None)
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
    # Ray's own default is 15: ranks and engines would wait for whatever else runs there.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Ray keeps the mode and the token that it has read first.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    _init(
        address="local",  # whatever RAY_ADDRESS says
        _node_ip_address="127.0.0.1",
        include_dashboard=False,
        labels={NODE_LABEL: "0"},
        num_cpus=max(2, num_slots),
        **slots_option(num_slots, device),
    )


def _init(**options: Any) -> None:
    ray.init(logging_level=logging.WARNING, log_to_driver=False, namespace="nanoslime", **options)


def disconnect() -> None:
    ray.shutdown()


def slots_option(num: int, device: str) -> dict[str, Any]:
    """Ray's options that reserve so many GPUs, or CPU slots."""
    if device == "cuda":
        return {"num_gpus": num}
    return {"resources": {SLOT: num}}
