"""Tiny checkpoints, one real SGLang server for the session, and the reference that
engines are compared with."""

import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nanoslime.config import (
    ModelConfig,
    RolloutConfig,
    RunConfig,
    TrainingConfig,
    WeightSyncConfig,
)
from nanoslime.engine_kind import EngineStart
from nanoslime.rollout.engines.sglang_client import SGLangEngine
from nanoslime.rollout.engines.sglang_server import SGLangServer
from tests import process_table

VOCAB_SIZE = 320


def save_tiny_model(path: Path, seed: int, tie: bool = False) -> Path:
    """A Qwen3 of two layers with random weights, in float32, and a tokenizer of bytes
    with a chat template.

    It has no end of sequence: random weights would sample it now and then, and end
    requests early.
    """
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=128,
        max_position_embeddings=4096,
        tie_word_embeddings=tie,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    save_byte_tokenizer(path)
    return path


def save_tied_with_head(path: Path, seed: int) -> Path:
    """A tied model whose files hold the output layer all the same, as Qwen3-0.6B's do."""
    file = save_tiny_model(path, seed, tie=True) / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, {"format": "pt"})
    return path


def save_byte_tokenizer(path: Path) -> None:
    """A token per byte, and a chat template."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(characters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    fast.save_pretrained(path)


def reference_logprobs(
    path: Path, prompt: list[int], response: list[int], temperature: float
) -> torch.Tensor:
    """log p of each response token by plain transformers, float32, one sequence: [R]."""
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0]
    # The logits at a position are of the token after it.
    of_response = logits[len(prompt) - 1 : -1]
    logprobs = torch.log_softmax(of_response.double() / temperature, -1)
    return logprobs.gather(1, torch.tensor(response)[:, None])[:, 0]


def make_server(
    model: Path,
    log: Path,
    port: int | None = None,
    index: int = 0,
    deadline_s: float = 300.0,
    trust_remote_code: bool = False,
    training: TrainingConfig | None = None,
    **sglang: object,
) -> SGLangServer:
    """A server on this machine's CPU; `sglang`: options of SGLang, `deadline_s`: of a sync."""
    options = {"max_total_tokens": 8192, "max_running_requests": 64, **sglang}
    config = RunConfig(
        model=ModelConfig(dtype="float32", trust_remote_code=trust_remote_code),
        rollout=RolloutConfig(sglang=options),
        training=training or TrainingConfig(),
        weight_sync=WeightSyncConfig(deadline_s=deadline_s),
    )
    start = EngineStart(config, index, model, device="cpu", host="127.0.0.1", log=log)
    return SGLangServer(start, port)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model_a"), seed=0)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Same names and shapes as `tiny_model`, other weights."""
    return save_tiny_model(tmp_path_factory.mktemp("model_b"), seed=1)


OWNER = """
import pickle, sys
from pathlib import Path
from nanoslime.processes.ports import free_port
from tests.serving import make_server
server = make_server(Path(sys.argv[1]), Path(sys.argv[2]), free_port("127.0.0.1"))
engine = server.start(deadline_s=280)
print(pickle.dumps((engine, server.process.pid)).hex(), flush=True)
sys.stdin.read()
server.close()
"""


class ServerOwner:
    """The process that owns the shared SGLang server.

    It is not the test session, so that a test can kill it. It starts when an engine is
    first asked for, and again after it was killed.
    """

    def __init__(self, model: Path, log: Path) -> None:
        self._arguments = [str(model), str(log)]
        self._process: subprocess.Popen[str] | None = None
        self._engine: SGLangEngine | None = None
        self.server_pid = 0

    def engine(self) -> SGLangEngine:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", OWNER, *self._arguments],
                cwd=Path(__file__).parents[1],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            told = bytes.fromhex(self._process.stdout.readline())
            self._engine, self.server_pid = pickle.loads(told)
        assert self._engine is not None
        return self._engine

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)

    def close(self) -> None:
        """Ask the owner to close its server and to end."""
        if self._process is not None and self._process.poll() is None:
            self._process.stdin.close()
            assert self._process.wait(30) == 0
            assert not process_table.process_group(self.server_pid)


@pytest.fixture(scope="session")
def shared_server(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerOwner]:
    owner = ServerOwner(tiny_model, tmp_path_factory.mktemp("sglang") / "engine-0.log")
    yield owner
    owner.close()


@pytest.fixture
def doomed_server(shared_server: ServerOwner) -> ServerOwner:
    """The session's server, for a test that kills it."""
    return shared_server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that kill the session's server come last: no other needs another start of it then."""
    items.sort(key=lambda item: "doomed_server" in getattr(item, "fixturenames", ()))


@pytest.fixture
def sglang_engine(shared_server: ServerOwner, tiny_model: Path) -> SGLangEngine:
    """The session's server with the weights of `tiny_model` at version 0, whatever ran
    before."""
    engine = shared_server.engine()
    engine.resume()
    engine.flush()
    engine.update_weights_from_disk(str(tiny_model), 0)
    return engine


def wait_until_running(engine: SGLangEngine, timeout_s: float = 60.0) -> None:
    """Returns once a request runs on the engine and has sampled a token."""
    found = process_table.wait_for(lambda: num_running(engine) > 0, timeout_s, interval_s=0.02)
    assert found, "no request runs"


def num_running(engine: SGLangEngine) -> int:
    """How many requests run, by the server's own count."""
    loads = engine._request("GET", "/v1/loads").json()["loads"]
    return sum(load["num_running_reqs"] for load in loads)
