"""The client of an SGLang server. It speaks HTTP only, and is the same on CPU and CUDA."""

from __future__ import annotations

import asyncio
import functools
import math
import secrets
import time
from base64 import b64encode
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import aiohttp
import orjson
import requests

from nanoslime.models.shape import ModelShape
from nanoslime.processes.logs import last_line
from nanoslime.rollout.engines.sglang_answer import Asked, read_generations
from nanoslime.storage.shared_files import as_json, publish_once, read_json
from nanoslime.types import (
    EngineGone,
    GenerateRequest,
    Generation,
    MemoryPart,
    PauseMode,
    RequestFailed,
    RunError,
    Status,
    TensorKind,
    WeightGroup,
)

# SGLang answers /health by generating a token, which takes about a second on a CPU.
_HEALTH_DEADLINE_S = 25.0
# SGLang closes a connection that has been idle for 5 seconds.
_KEEP_ALIVE_S = 3.0
# HTTP's 4xx that another try may save: request timeout, too many requests.
_TRANSIENT_REFUSALS = (408, 429)
_MAX_REASON_CHARS = 300
_JSON = {"Content-Type": "application/json"}
# The load format of an update from disk that must not change anything; our plug-in knows it.
COMPARING = "nanoslime-comparing"
# Stands before the tensors that a check of weights asks about; likewise. Without the plug-in it
# is the name of no tensor.
AGREE = "nanoslime-agree"
# SGLang's option for the secret that each request has to show, health checks excepted.
_API_KEY = "api-key"


def make_key(path: Path) -> None:
    """A new secret, unless the file is there: options of SGLang, which YAML reads too."""
    publish_once(path, as_json({_API_KEY: secrets.token_hex(32)}), mode=0o600)


@functools.cache
def _key_in(path: Path) -> str:
    return str(read_json(path)[_API_KEY])


class HttpSessions:
    """One HTTP session for each event loop that asks; it closes with its loop.

    A copy in another process starts without any.
    """

    def __init__(self) -> None:
        self._by_loop: WeakKeyDictionary[
            asyncio.AbstractEventLoop, tuple[aiohttp.ClientSession, AsyncGenerator]
        ] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[HttpSessions], tuple[()]]:
        return HttpSessions, ()

    async def here(self) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        if loop not in self._by_loop:
            # A loop that ends closes the generators that began in it.
            opened = self._open()
            self._by_loop[loop] = await anext(opened), opened
        return self._by_loop[loop][0]

    async def _open(self) -> AsyncGenerator[aiohttp.ClientSession]:
        # The router bounds the number of requests.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S)
        async with aiohttp.ClientSession(connector=connector, headers=_JSON) as session:
            yield session


@dataclass(frozen=True, slots=True)
class SGLangEngine:
    """The client of one server: an `Engine` and a `BroadcastEngine`.

    It can be pickled, and it ignores the proxy variables of the environment.
    """

    name: str
    url: str
    log: str
    vocab_size: int
    world_size: int = 1
    # The model, where the server reports the experts of each token.
    experts_of: ModelShape | None = None
    request_deadline_s: float = 1800.0
    control_deadline_s: float = 300.0
    # Whoever has the client reads the key there: it travels with no message. None: there is none.
    key_file: Path | None = None
    _sessions: HttpSessions = field(
        default_factory=HttpSessions, init=False, repr=False, compare=False
    )

    async def generate(self, request: GenerateRequest) -> list[Generation]:
        """`request.n` continuations. A request that SGLang refuses gets status error.

        Raises RunError for a token id outside the vocabulary, and RequestFailed where the
        server is gone, fails, does not answer within `request_deadline_s`, or answers
        something else.
        """
        request.check_tokens(self.vocab_size, self.name)
        status, content = await self._post_generate(self._generate_body(request))
        if 400 <= status < 500 and status not in _TRANSIENT_REFUSALS:
            message = f"SGLang refused it ({status}): {_reason(content)}"
            refused = Generation([], [], Status.ERROR, [], error=message)
            return [refused] * request.n
        if status != 200:
            raise self._error(f"/generate answered {status}: {_reason(content)}", RequestFailed)
        begin = time.monotonic()
        asked = Asked(request, self.vocab_size, self.experts_of)
        try:
            first, *others = read_generations(content, asked)
        except (ValueError, LookupError, TypeError, AttributeError) as e:
            raise self._error(
                f"/generate answered what is no generation ({type(e).__name__}: {e}): "
                f"{_beginning(content)!r}",
                RequestFailed,
            ) from e
        return [replace(first, parse_s=time.monotonic() - begin), *others]

    def _generate_body(self, request: GenerateRequest) -> bytes:
        sampling_params = {
            "n": request.n,
            "max_new_tokens": request.max_new_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k,
            "stop_token_ids": list(request.stop_token_ids),
            "stop": list(request.stop),
            "skip_special_tokens": False,
        }
        body = {
            "input_ids": request.token_ids,
            "sampling_params": sampling_params,
            "return_logprob": True,
            "return_routed_experts": self.experts_of is not None,
        }
        return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)

    async def _post_generate(self, body: bytes) -> tuple[int, bytes]:
        """The status and the content of the answer. Raises RequestFailed where there is none."""
        timeout = aiohttp.ClientTimeout(total=self.request_deadline_s)
        key = self.authorization()
        session = await self._sessions.here()
        try:
            # A cancelled request closes its connection, and SGLang aborts it then.
            url = f"{self.url}/generate"
            asked = session.post(
                url, data=body, headers=key, timeout=timeout, allow_redirects=False
            )
            async with asked as got:
                return got.status, await got.read()
        except TimeoutError as e:
            raise self._error(
                f"/generate was not answered within {self.request_deadline_s:g} s", RequestFailed
            ) from e
        except (aiohttp.ClientError, OSError) as e:
            raise self._error(f"/generate failed: {type(e).__name__}: {e}", RequestFailed) from e

    def authorization(self) -> dict[str, str]:
        """The header that shows the server its key."""
        return {"Authorization": f"Bearer {_key_in(self.key_file)}"} if self.key_file else {}

    def health(self) -> bool:
        """Whether the server generates. It does not while it starts, is paused, or is gone."""
        try:
            response = self._request("GET", "/health", deadline_s=_HEALTH_DEADLINE_S)
        except RunError:
            return False
        return response.status_code == 200

    def pause(self, mode: PauseMode = "retract") -> None:
        """Stop generating. New requests wait; what happens to running ones is the mode."""
        self._post("/pause_generation", mode=mode)

    def resume(self) -> None:
        self._post("/continue_generation")

    def interrupt(self) -> None:
        self._request("POST", "/abort_request", {"abort_all": True}, _HEALTH_DEADLINE_S)

    def score(self, token_ids: Sequence[int]) -> tuple[list[float], int]:
        """SGLang takes no prefix from its cache where logprobs are asked for from token 0 on; it
        draws no random number for a token of temperature 0.
        """
        answer = self._post(
            "/generate",
            input_ids=list(token_ids),
            sampling_params={"max_new_tokens": 1, "temperature": 0.0},
            return_logprob=True,
            logprob_start_len=0,
        )
        try:
            meta = answer["meta_info"]
            found = [entry[0] for entry in meta["input_token_logprobs"][1:]]
            if len(found) != len(token_ids) - 1:
                raise ValueError(f"{len(found)} of {len(token_ids)} tokens")
            # JSON has no NaN.
            scored = [math.nan if logprob is None else float(logprob) for logprob in found]
            return scored, int(meta["weight_version"])
        except (LookupError, TypeError, ValueError) as e:
            raise self._error(f"/generate answered no logprobs of a prompt: {e}") from e

    def agree(self, tensors: Sequence[TensorKind]) -> None:
        listed = orjson.dumps(tensors).decode()
        answer = self._post("/weights_checker", skip_tensor_list=[AGREE, listed])
        self._require_plugin(answer, "tensors agreed")

    def flush(self) -> None:
        """Empty the prefix cache.

        SGLang refuses while requests run, so this tries again until the deadline.
        """
        end = time.monotonic() + self.control_deadline_s
        while True:
            response = self._request("POST", "/flush_cache", {})
            if response.status_code == 200:
                return
            if time.monotonic() > end:
                raise self._error(
                    f"cache not flushed in {self.control_deadline_s:g} s, requests still run: "
                    f"{response.text}"
                )
            time.sleep(0.05)

    def policy_version(self) -> int:
        response = self._request("GET", "/model_info")
        try:
            return int(response.json()["weight_version"])
        except (ValueError, LookupError, TypeError) as e:
            raise self._error(
                f"/model_info answered no weight version that is a number "
                f"({response.status_code}): {response.text[:_MAX_REASON_CHARS]!r}"
            ) from e

    def update_weights_from_disk(
        self, path: str, version: int, *, flush: bool = True, compares: bool = False
    ) -> None:
        """Load the safetensors of a directory.

        Raises RunError, with the weights as they were, where names or shapes differ, or the
        manifest; and where it `compares` and the load changes a parameter.
        """
        answer = self._post(
            "/update_weights_from_disk",
            model_path=path,
            load_format=COMPARING if compares else "auto",
            weight_version=str(version),
            flush_cache=flush,
        )
        self._require_plugin(answer, "tensors checked")

    def join_weight_group(self, group: WeightGroup, first_rank: int) -> None:
        """Join the group as ranks first_rank .. first_rank + self.world_size - 1.

        Blocks until all ranks of the group have joined.
        """
        self._post(
            "/init_weights_update_group",
            master_address=group.address,
            master_port=group.port,
            rank_offset=first_rank,
            world_size=group.world_size,
            group_name=group.name,
            backend=group.backend,
        )

    def begin_update(self) -> None:
        answer = self._post("/begin_weight_update")
        self._require_plugin(answer, "tensors expected")

    def receive_buckets(
        self, *, names: list[str], dtypes: list[str], shapes: list[list[int]], group: str
    ) -> None:
        """Receive broadcasts from rank 0 of the group, one for each header of sealed_bucket.py
        among the names: a header and the tensors after it, one after the other.

        Those have the checkpoint's names. Blocks until all is loaded. Raises RunError, once all
        was received, for an unknown or repeated name, another shape, or a header that is not
        that of the next bucket or of these bytes.
        """
        self._post(
            "/update_weights_from_distributed",
            names=names,
            dtypes=dtypes,
            shapes=shapes,
            group_name=group,
            load_format="flattened_bucket",
            flush_cache=False,
        )

    def receive_payloads(self, payloads: list[bytes]) -> None:
        """Receive one bucket, which weight_sync/colocated.py serialized for each rank.

        Raises RunError for the same causes as `receive_buckets`.
        """
        encoded = [b64encode(payload).decode() for payload in payloads]
        self._post(
            "/update_weights_from_tensor",
            serialized_named_tensors=encoded,
            load_format="flattened_bucket",
            flush_cache=False,
        )

    def end_update(self, version: int, *, flush: bool = True) -> None:
        """Close the session, flush the cache, set the version.

        Raises RunError where a tensor never came, or those of another version did.
        """
        message = self._post("/end_weight_update").get("message")
        if message != f"version {version}":
            raise self._error(f"holds the weights of {message}, and should hold version {version}")
        if flush:
            self.flush()
        self._post("/update_weight_version", new_version=str(version), abort_all_requests=False)

    def abandon_update(self, group: str) -> None:
        # SGLang refuses to end what was not begun, and to leave a group that is not its own.
        self._request("POST", "/end_weight_update", {})
        self._request("POST", "/destroy_weights_update_group", {"group_name": group})

    def release_memory(self) -> None:
        """Free weights, KV cache and CUDA graphs; on a CPU, SGLang keeps them.

        Waits until nothing runs: SGLang dies when it is asked to release while a
        request is on its way out.
        """
        self.flush()
        self._post("/release_memory_occupation")

    def resume_memory(self, part: MemoryPart) -> None:
        """Take back each part once after `release_memory`; SGLang dies of another order."""
        tags = ["weights"] if part == "weights" else ["kv_cache", "cuda_graph"]
        self._post("/resume_memory_occupation", tags=tags)

    def _post(self, path: str, **body: Any) -> dict[str, Any]:
        """The answer's JSON. Raises RunError where SGLang refuses, by status or by `success`."""
        response = self._request("POST", path, body)
        answer = response.json() if response.text.startswith("{") else {}
        if response.status_code != 200 or answer.get("success") is False:
            reason = answer.get("message") or response.text[:500]
            raise self._error(f"{path} refused ({response.status_code}): {reason}")
        return answer

    def _request(
        self, method: str, path: str, body: Any = None, deadline_s: float | None = None
    ) -> requests.Response:
        if deadline_s is None:
            deadline_s = self.control_deadline_s
        try:
            with requests.Session() as session:
                session.trust_env = False
                session.headers.update(self.authorization())
                return session.request(method, f"{self.url}{path}", json=body, timeout=deadline_s)
        except requests.Timeout as e:
            problem = f"{path} was not answered within {deadline_s:g} s"
            raise self._error(problem, EngineGone) from e
        except requests.RequestException as e:
            raise self._error(f"{path} failed: {type(e).__name__}: {e}", EngineGone) from e

    def _require_plugin(self, answer: dict[str, Any], mark: str) -> None:
        """Raises RunError unless the answer bears the mark that our plug-in leaves in it."""
        if mark not in str(answer.get("message")):
            raise self._error(
                "does not check tensor names: SGLang did not load our plug-in; "
                "make the environment again with env/run.sh"
            )

    def _error(self, problem: str, kind: type[RunError] = RunError) -> RunError:
        line = last_line(Path(self.log))
        return kind(
            f"engine {self.name} at {self.url}: {problem}; log: {self.log}; last line: {line}"
        )


def _reason(content: bytes) -> str:
    """The message in an answer that is an error; the answer itself where it has none."""
    try:
        reason = orjson.loads(content)["error"]
    except (ValueError, LookupError, TypeError):
        return _beginning(content)
    if isinstance(reason, dict):
        reason = reason.get("message", reason)
    return str(reason)[:_MAX_REASON_CHARS]


def _beginning(content: bytes) -> str:
    return content[:_MAX_REASON_CHARS].decode(errors="replace")
