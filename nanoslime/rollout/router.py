"""Spreads requests over engines: by least requests in flight, or through the sglang-router program."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol

import requests

from nanoslime.rollout.child_process import ChildProcess, require_free_port
from nanoslime.rollout.sglang import EngineLost, SGLangEngine
from nanoslime.types import Engine, GenerateRequest, Generation, RunError

logger = logging.getLogger(__name__)
_HOST = "127.0.0.1"
_START_DEADLINE_S = 120.0


class Router(Protocol):
    """What `sample_groups` asks for samples; an Engine is one, too."""

    async def generate(self, request: GenerateRequest) -> list[Generation]: ...
    def close(self) -> None: ...


class LeastInflightRouter:
    """Gives each request to the engine with the fewest sequences in flight.

    A lost engine leaves the rotation, named in `lost` with its cause; its requests go to the others.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = {engine.name: engine for engine in engines}
        if not engines or len(self._engines) < len(engines):
            raise RunError(f"a router needs engines with names of their own, got {[e.name for e in engines]}")
        self._inflight = dict.fromkeys(self._engines, 0)
        self.lost: dict[str, str] = {}

    async def generate(self, request: GenerateRequest) -> list[Generation]:
        """Raises RunError, naming each engine's cause, when none is left."""
        while left := [name for name in self._engines if name not in self.lost]:
            name = min(left, key=self._inflight.__getitem__)
            self._inflight[name] += request.n
            try:
                return await self._engines[name].generate(request)
            except EngineLost as e:
                if name not in self.lost:
                    self.lost[name] = str(e)
                    num_left = len(self._engines) - len(self.lost)
                    logger.error("out of rotation: %s; %d engines left", e, num_left)
            finally:
                self._inflight[name] -= request.n
        raise RunError("no engine is left: " + "; ".join(self.lost.values()))

    def close(self) -> None:
        """The engines belong to others."""


class SGLangRouter:
    """The sglang-router program on this host, a child process; it checks the engines' health and retries."""

    def __init__(self, engines: Sequence[SGLangEngine], ports: tuple[int, int], log: Path) -> None:
        """`ports`: for requests and for metrics. Raises RunError when one is taken, or when the router does
        not see every engine in time."""
        for port in ports:
            require_free_port(_HOST, port, "sglang-router", "give it another port")
        options = {
            "--host": _HOST,
            "--port": ports[0],
            "--prometheus-host": _HOST,
            "--prometheus-port": ports[1],
            "--policy": "power_of_two" if len(engines) > 1 else "round_robin",
            "--worker-startup-check-interval": 1,
            "--request-timeout-secs": int(engines[0].request_deadline_s),
        }
        command = [sys.executable, "-m", "sglang_router.launch_router"]
        command += [str(word) for option in options.items() for word in option]
        command += ["--worker-urls", *(engine.url for engine in engines)]
        self._num_engines = len(engines)
        self._client = replace(
            engines[0], name="sglang-router", url=f"http://{_HOST}:{ports[0]}", log=str(log)
        )
        env = os.environ | {"NO_PROXY": "*", "no_proxy": "*"}
        self._process = ChildProcess("sglang-router", command, env, log)
        self._process.wait_until(self._ready, f"{len(engines)} healthy engines", _START_DEADLINE_S)

    async def generate(self, request: GenerateRequest) -> list[Generation]:
        return await self._client.generate(request)

    def close(self) -> None:
        self._process.close()

    def _ready(self) -> bool:
        with requests.Session() as session:
            session.trust_env = False
            try:
                answer = session.get(f"{self._client.url}/readiness", timeout=5)
                return answer.ok and answer.json().get("healthy_workers") == self._num_engines
            except requests.RequestException:
                return False


def make_router(
    kind: Literal["least_inflight", "sglang"], engines: Sequence[Engine], ports: tuple[int, int], log: Path
) -> Router:
    """The router that RolloutConfig.router names; `ports` and `log` are SGLangRouter's."""
    if kind == "least_inflight":
        return LeastInflightRouter(engines)
    remote = [engine for engine in engines if isinstance(engine, SGLangEngine)]
    if len(remote) < len(engines):
        raise RunError(
            "rollout.router=sglang routes to SGLang servers only; use least_inflight for an embedded engine"
        )
    return SGLangRouter(remote, ports, log)
