"""Spreads requests over engines: by least requests in flight, or through the sglang-router program."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import requests

from nanoslime.rollout.child_process import ChildProcess, require_free_port
from nanoslime.rollout.sglang import EngineLost, SGLangEngine
from nanoslime.types import Engine, GenerateRequest, Generation, RunError

logger = logging.getLogger(__name__)


class Router(Protocol):
    """What `sample_groups` asks for samples; an Engine is one, too."""

    async def generate(self, request: GenerateRequest) -> list[Generation]: ...
    def close(self) -> None: ...


class LeastInflightRouter:
    """Gives each request to the engine with the fewest sequences in flight.

    An engine that is lost leaves the rotation, named in `lost` with its cause, and its requests go to the
    others.
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
                    logger.error(
                        "out of rotation: %s; %d engines left", e, len(self._engines) - len(self.lost)
                    )
            finally:
                self._inflight[name] -= request.n
        raise RunError("no engine is left: " + "; ".join(self.lost.values()))

    def close(self) -> None:
        """The engines belong to others."""


class SGLangRouter:
    """The sglang-router program in front of SGLang engines, as a child process; it checks their health and
    retries."""

    def __init__(
        self,
        engines: Sequence[SGLangEngine],
        *,
        host: str,
        port: int,
        metrics_port: int,
        log: Path,
        deadline_s: float = 120.0,
    ) -> None:
        """Raises RunError when a port is taken, or when the router does not see every engine within
        `deadline_s`."""
        for taken in (port, metrics_port):
            require_free_port(host, taken, "sglang-router", "give it another port")
        options = {
            "--host": host,
            "--port": port,
            "--prometheus-host": host,
            "--prometheus-port": metrics_port,
            "--policy": "power_of_two" if len(engines) > 1 else "round_robin",
            "--worker-startup-check-interval": 1,
            "--request-timeout-secs": int(engines[0].request_deadline_s),
        }
        command = [sys.executable, "-m", "sglang_router.launch_router"]
        command += [str(word) for option in options.items() for word in option]
        command += ["--worker-urls", *(engine.url for engine in engines)]
        self._num_engines = len(engines)
        self._client = SGLangEngine(
            name="sglang-router",
            url=f"http://{host}:{port}",
            log=str(log),
            vocab_size=min(engine.vocab_size for engine in engines),
            request_deadline_s=engines[0].request_deadline_s,
        )
        env = os.environ | {"NO_PROXY": "*", "no_proxy": "*"}
        self._process = ChildProcess("sglang-router", command, env, log)
        self._process.wait_until(self._ready, f"{len(engines)} healthy engines", deadline_s)

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
    kind: Literal["least_inflight", "sglang"],
    engines: Sequence[Engine],
    *,
    host: str = "127.0.0.1",
    ports: tuple[int, int] | None = None,
    log: Path | None = None,
) -> Router:
    """The router that RolloutConfig.router names; `ports` (requests, metrics) and `log` are for kind
    sglang."""
    if kind == "least_inflight":
        return LeastInflightRouter(engines)
    remote = [engine for engine in engines if isinstance(engine, SGLangEngine)]
    if len(remote) < len(engines) or ports is None or log is None:
        raise RunError(
            "rollout.router=sglang routes to SGLang servers only; use least_inflight for an embedded engine"
        )
    return SGLangRouter(remote, host=host, port=ports[0], metrics_port=ports[1], log=log)
