"""A tied model whose files hold the output layer all the same, as Qwen3-0.6B's do, on a real
SGLang: what trainers send is what the engine takes, by every transport.

Its tokenizer is code of the checkpoint, which SGLang runs because the model is trusted.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from nanoslime.orchestration.groups import LocalTrainGroup
from nanoslime.processes.ports import free_port
from nanoslime.rollout.engines.sglang_client import SGLangEngine
from nanoslime.run_dir import RunDir
from nanoslime.sealed_bucket import Place
from nanoslime.training.backend import RankEnv
from nanoslime.types import RunError
from nanoslime.weight_sync.devices import SeparateDevices
from nanoslime.weight_sync.engine_pool import EnginePool
from nanoslime.weight_sync.session import SyncSession
from tests.orchestration.test_weight_sync import gap, run_config, sample, train_once
from tests.rollout.engines.test_sglang_client import send_tensors
from tests.serving import make_server, save_tied_with_head

pytestmark = pytest.mark.sglang

TOKENIZER = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        Path({witness!r}).touch()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tied_with_head(tmp_path_factory.mktemp("tied") / "model", seed=0)
    code = TOKENIZER.format(witness=str(directory.parent / "code ran"))
    (directory / "tokenization_own.py").write_text(code)
    config = directory / "tokenizer_config.json"
    values = json.loads(config.read_text())
    values["auto_map"] = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    config.write_text(json.dumps(values | {"tokenizer_class": "OwnTokenizer"}))
    return directory


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[SGLangEngine]:
    log = model.parent / "engine.log"
    server = make_server(model, log, free_port("127.0.0.1"), trust_remote_code=True)
    try:
        yield server.start(deadline_s=280)
    finally:
        server.close()


def test_code_of_a_trusted_checkpoint_runs_in_sglang(engine: SGLangEngine, model: Path) -> None:
    assert (model.parent / "code ran").exists()


@pytest.mark.parametrize("transport", ["disk", "broadcast", "tensor"])
def test_what_a_trainer_of_a_tied_model_sends_is_taken(
    engine: SGLangEngine, model: Path, tmp_path: Path, transport: str
) -> None:
    engine.update_weights_from_disk(str(model), 0)
    meeting = f"tcp://127.0.0.1:{free_port('127.0.0.1')}"
    env = RankEnv(rank=0, world_size=1, local_rank=0, device="cpu", init_method=meeting)
    group = LocalTrainGroup(run_config("fsdp"), RunDir.create(tmp_path, "run"), model, env)
    engines = EnginePool([engine])
    session = SyncSession(
        group,
        engines,
        SeparateDevices(),
        transport=transport,
        directory=tmp_path / "weights",
        deadline_s=120.0,
    )
    try:
        group.setup()
        session.open([[0]])
        groups = sample(engine, seed=1)
        train_once(group._worker, groups)
        assert gap(group._worker, groups) > 1e-2, "a stale engine would not be seen"
        session.sync(1)
        assert engine.policy_version() == 1
        assert gap(group._worker, sample(engine, seed=2)) < 1e-4
    finally:
        group.close()


def test_a_trained_tensor_that_never_came_is_missed_whatever_repeats_came(
    engine: SGLangEngine, model: Path
) -> None:
    tensors = load_file(model / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    engine.begin_update()
    send_tensors(engine, tensors, Place(2, 0, 1))
    with pytest.raises(RunError, match="1 of 24 tensors missing: model.norm.weight"):
        engine.end_update(2)
    engine.begin_update()
    with pytest.raises(RunError, match="unknown tensor 'lm_head.wait'"):
        send_tensors(engine, {"lm_head.wait": norm}, Place(2, 0, 1))
    del tensors["lm_head.weight"]
    send_tensors(engine, {**tensors, "model.norm.weight": norm}, Place(2, 0, 1))
    engine.end_update(2)
    assert engine.policy_version() == 2
