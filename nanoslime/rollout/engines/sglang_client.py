"""The client of an SGLang server. It speaks HTTP only, and is the same on CPU and CUDA."""

from __future__ import annotations

import json
import time
from base64 import b64decode, b64encode
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import aiohttp
import numpy as np
import requests

from nanoslime.models.shape import ModelShape
from nanoslime.processes.logs import last_line
from nanoslime.types import EngineLost, GenerateRequest, Generation, MemoryPart, RunError, Status

PauseMode = Literal["retract", "in_place", "abort"]

_STATUS = {"stop": Status.COMPLETED, "length": Status.TRUNCATED, "abort": Status.ABORTED}


@dataclass(frozen=True, slots=True)
class SGLangEngine:
    """Client of one server, picklable: an `Engine` and a `BroadcastEngine`. Ignores proxy variables."""

    name: str
    url: str
    log: str
    vocab_size: int
    world_size: int = 1
    experts_of: ModelShape | None = None  # the model, where the experts of each token are asked for
    request_deadline_s: float = 1800.0
    control_deadline_s: float = 300.0

    async def generate(self, request: GenerateRequest) -> list[Generation]:
        """`request.n` continuations. What SGLang rejects (too long) gets status error with its words.

        Raises RunError for a token id outside the vocabulary, EngineLost for a server that does not answer
        within `request_deadline_s`, or that is gone.
        """
        request.check_tokens(self.vocab_size, self.name)
        sampling = {
            **asdict(request),
            "skip_special_tokens": False,
        }  # the fields have SGLang's own names
        token_ids, _ = [int(token) for token in sampling.pop("token_ids")], sampling.pop("seed")
        body = {"input_ids": token_ids, "sampling_params": sampling, "return_logprob": True}
        body["return_routed_experts"] = self.experts_of is not None
        timeout = aiohttp.ClientTimeout(total=self.request_deadline_s)
        try:
            # A session per request: event loops come and go, and a closed connection makes SGLang abort it.
            async with (
                aiohttp.ClientSession(trust_env=False, timeout=timeout) as session,
                session.post(f"{self.url}/generate", json=body) as response,
            ):
                answer = await response.json(content_type=None)
        except TimeoutError as e:
            late = f"/generate was not answered within {self.request_deadline_s:g} s"
            raise self._error(late, EngineLost) from e
        except (aiohttp.ClientError, OSError, json.JSONDecodeError) as e:
            raise self._error(f"/generate failed: {type(e).__name__}: {e}", EngineLost) from e
        if response.status == 400:
            return [
                Generation([], [], Status.ERROR, [], str(answer.get("error", answer)))
            ] * request.n
        if response.status != 200:
            raise self._error(
                f"/generate answered {response.status}: {str(answer)[:300]}", EngineLost
            )
        answers = answer if isinstance(answer, list) else [answer]
        return [_generation(item, len(token_ids), self.experts_of) for item in answers]

    def health(self) -> bool:
        """Whether the server generates. False while it starts, is paused, or is gone."""
        try:
            return self._request("GET", "/health", timeout_s=25).status_code == 200
        except RunError:
            return False

    def pause(self, mode: PauseMode = "retract") -> None:
        """Stop generating; new requests wait. Running ones: retract, kept and recomputed after `resume`, so
        that the cache can be flushed; in_place, kept with their cache; abort, ended with what they have."""
        self._post("/pause_generation", mode=mode)

    def resume(self) -> None:
        self._post("/continue_generation")

    def flush(self) -> None:
        """Empty the prefix cache; SGLang refuses while requests run, hence tried again until the deadline."""
        end = time.monotonic() + self.control_deadline_s
        while (response := self._request("POST", "/flush_cache", {})).status_code != 200:
            if time.monotonic() > end:
                late = f"cache not flushed in {self.control_deadline_s:g} s, requests still run"
                raise self._error(f"{late}: {response.text}")
            time.sleep(0.05)

    def policy_version(self) -> int:
        version = self._request("GET", "/model_info").json()["weight_version"]
        try:
            return int(version)
        except ValueError as e:
            raise self._error(f"reports weight version {version!r}, which is not a number") from e

    def update_weights_from_disk(self, path: str, version: int) -> None:
        """Load a directory's safetensors. Raises RunError, weights unchanged, when names or shapes differ."""
        answer = self._post(
            "/update_weights_from_disk", model_path=path, weight_version=str(version)
        )
        self._require_plugin(answer, "tensors checked")

    def init_weight_group(
        self,
        *,
        address: str,
        port: int,
        rank_offset: int,
        world_size: int,
        group: str,
        backend: str,
    ) -> None:
        """Join as ranks rank_offset .. rank_offset + self.world_size - 1; blocks until all have joined."""
        ranks = {"rank_offset": rank_offset, "world_size": world_size}
        meet = {
            "master_address": address,
            "master_port": port,
            "group_name": group,
            "backend": backend,
        }
        self._post("/init_weights_update_group", **meet, **ranks)

    def begin_update(self) -> None:
        self._require_plugin(self._post("/begin_weight_update"), "tensors expected")

    def receive_bucket(
        self, *, names: list[str], dtypes: list[str], shapes: list[list[int]], group: str
    ) -> None:
        """Receive one broadcast from rank 0 of the group per tensor, in the order of `names`, which are those
        of the checkpoint; blocks until all were sent. Raises RunError, once they were received, for an
        unknown or repeated name or another shape."""
        bucket = {"names": names, "dtypes": dtypes, "shapes": shapes, "group_name": group}
        self._post("/update_weights_from_distributed", **bucket, flush_cache=False)

    def end_update(self, version: int) -> None:
        """Close the session, flush the cache, set the version. Raises RunError when a tensor never came."""
        self._post("/end_weight_update")
        self.flush()
        self._post("/update_weight_version", new_version=str(version), abort_all_requests=False)

    def receive_payloads(self, payloads: list[bytes]) -> None:
        """One bucket, serialized for each rank by weight_sync/colocated.py; refused as a broadcast is."""
        encoded = [b64encode(payload).decode() for payload in payloads]
        body = {
            "serialized_named_tensors": encoded,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        self._post("/update_weights_from_tensor", **body)

    def release_memory(self) -> None:
        """Free weights, KV cache and CUDA graphs; on a CPU, SGLang keeps them. Waits until nothing runs."""
        self.flush()  # SGLang dies when asked to release while a request is on its way out
        self._post("/release_memory_occupation")

    def resume_memory(self, part: MemoryPart) -> None:
        """Each part once after `release_memory`; SGLang dies of another order."""
        tags = ["weights"] if part == "weights" else ["kv_cache", "cuda_graph"]
        self._post("/resume_memory_occupation", tags=tags)

    def destroy_weight_group(self, group: str) -> None:
        self._post("/destroy_weights_update_group", group_name=group)

    def _post(self, path: str, **body: Any) -> dict[str, Any]:
        response = self._request("POST", path, body)
        answer = response.json() if response.text.startswith("{") else {}
        if response.status_code != 200 or answer.get("success") is False:
            reason = answer.get("message") or response.text[:500]
            raise self._error(f"{path} refused ({response.status_code}): {reason}")
        return answer

    def _request(
        self, method: str, path: str, body: Any = None, timeout_s: float = 0
    ) -> requests.Response:
        timeout_s = timeout_s or self.control_deadline_s
        try:
            with requests.Session() as session:
                session.trust_env = False
                return session.request(method, f"{self.url}{path}", json=body, timeout=timeout_s)
        except requests.Timeout as e:
            raise self._error(f"{path} was not answered within {timeout_s:g} s") from e
        except requests.RequestException as e:
            raise self._error(f"{path} failed: {type(e).__name__}: {e}") from e

    def _require_plugin(self, answer: dict[str, Any], mark: str) -> None:
        if mark not in str(answer.get("message")):
            cause = "SGLang did not load our plug-in; pip install -e . the project"
            raise self._error(f"does not check tensor names: {cause}")

    def _error(self, what: str, kind: type[RunError] = RunError) -> RunError:
        line = last_line(Path(self.log))
        return kind(f"engine {self.name} at {self.url}: {what}; log: {self.log}; last line: {line}")


def _generation(answer: dict[str, Any], num_prompt: int, shape: ModelShape | None) -> Generation:
    meta = answer["meta_info"]
    logprobs = [entry[0] for entry in meta["output_token_logprobs"]]
    token_ids = list(answer["output_ids"])
    reason = meta["finish_reason"]
    if len(logprobs) != len(token_ids):
        raise RunError(
            f"SGLang gave {len(token_ids)} tokens, {len(logprobs)} logprobs (request {meta['id']})"
        )
    spans = meta.get("weight_versions") or [{"version": meta["weight_version"], "start": 0}]
    versions = [(int(span["start"]), int(span["version"])) for span in spans]
    experts = None
    if (
        shape and (moe := shape.moe) and token_ids
    ):  # a request that was ended before it ran has none
        size = (num_prompt + len(token_ids) - 1, shape.num_layers, moe.num_experts_per_token)
        numbers = np.frombuffer(b64decode(meta["routed_experts"]), dtype=np.int32).reshape(size)
        experts = numbers[:, list(shape.moe_layers)].astype(
            np.uint8 if moe.num_experts <= 256 else np.int16
        )
    return Generation(
        token_ids, logprobs, _STATUS[reason["type"]], versions, reason.get("message"), experts
    )
