"""Something goes wrong in a weight sync, in whatever part of it. It is seen in the same step, the
message says of whom and of what, and no engine serves anything but whole weights, old or new.

Four Megatron ranks (TP 2 x PP 2) and two real SGLang servers; see faulty_run.py.
"""

import asyncio
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from nanoslime.orchestration.groups import LocalTrainGroup
from nanoslime.processes.ports import free_port
from nanoslime.rollout.engines.sglang_client import SGLangEngine
from nanoslime.run_dir import RunDir
from nanoslime.training.backend import RankEnv
from nanoslime.types import GenerateRequest, Generation, RunError, Status
from nanoslime.weight_sync.devices import SeparateDevices
from nanoslime.weight_sync.engine_pool import EnginePool
from nanoslime.weight_sync.session import SyncSession
from tests.orchestration.test_engine_faults import Place
from tests.weight_sync import faulty_run
from tests.weight_sync.faulty_run import ALWAYS, TOKENS, Case, Outcome, play

pytestmark = [pytest.mark.sglang, pytest.mark.megatron, pytest.mark.timeout(400)]
ASK_S = 4.0
NUM_TOKENS = 800


@pytest.fixture(scope="module")
def engines(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[SGLangEngine]]:
    directory = tmp_path_factory.mktemp("engines")
    places = [Place(f"engine-{i}", tiny_model, directory / f"engine-{i}.log") for i in range(2)]
    try:
        with ThreadPoolExecutor() as threads:
            yield list(threads.map(Place.start, places))
    finally:
        for place in places:
            place.close()


class Requests:
    """Some that run on engines while a sync goes wrong."""

    def __init__(self, engines: list[SGLangEngine]) -> None:
        self._engines = engines
        self._answers: list[Generation] = []
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def answers(self) -> list[Generation]:
        self._thread.join(120)
        assert not self._thread.is_alive(), "requests were not answered"
        return self._answers

    def _ask(self) -> None:
        request = GenerateRequest([40, 41, 42], n=1, max_new_tokens=NUM_TOKENS, temperature=1.0)

        async def ask() -> list[list[Generation]]:
            calls = [engine.generate(request) for engine in self._engines for _ in range(2)]
            return await asyncio.gather(*calls)

        self._answers = [answer for [answer] in asyncio.run(ask())]


def ready(engine: SGLangEngine, model: Path) -> None:
    """With version 0, out of whatever an earlier run has left."""
    engine.abandon_update("nanoslime-weights")
    engine.update_weights_from_disk(str(model), 0, flush=False)
    engine.resume()


def found(engine: SGLangEngine, outcome: Outcome) -> str:
    """The version that an engine names, and the weights that it generates with."""
    version = engine.policy_version()
    try:
        scored, _ = replace(engine, control_deadline_s=ASK_S).score(TOKENS)
    except RunError:
        return f"{version}, paused"
    for name, logprobs in (("old", outcome.old), ("new", outcome.new)):
        if np.abs(np.array(scored) - np.array(logprobs)).max() < 1e-4:
            return f"{version}, {name}"
    return f"{version}, other weights"


NAMED = {
    "a bit flipped after the seal": r"bucket \d+ of version 2 has not the bytes that were sent",
    "a bucket of an older label": r"a bucket of another update, Place\(version=1,",
    "a bucket dropped": r"bucket \d+ of version 2 came where \d+ was next",
    "two buckets exchanged": r"bucket \d+ of version 2 came where \d+ was next",
    "a bucket sent twice": r"bucket \d+ of version 2 came where \d+ was next",
    "a tensor renamed": r"unknown tensor '(lm_head|model)\..*_renamed'",
    "another shape": r"tensor '(lm_head|model)\..*' has shape \[1, ",
    "another dtype": r"bucket \d+ of version 2 has other names, dtypes or shapes",
    "a name that comes twice": r"tensor '(lm_head|model)\..*' came twice",
    "two names exchanged": r"bucket \d+ of version 2 has other names, dtypes or shapes",
    "all buckets of an older label": "holds the weights of version 1, and should hold version 2",
    "a bit flipped in a file": r"version_2/model.safetensors was altered",
    "a file truncated": r"version_2/model.safetensors is truncated",
    "a file missing": r"version_2/model.safetensors is missing; manifest.json lists it",
    "the manifest of another version": r"version_2/model.safetensors was altered",
}
OF_FILES = list(NAMED)[-4:]
OF_BUCKETS = list(NAMED)[:-5]
# Colocated, these befall one of the two engines.
OF_ONE_ENGINE = OF_BUCKETS[2:]


PASSING = [Case(fault, way) for way in ("broadcast", "tensor") for fault in OF_BUCKETS]
PASSING += [Case(fault, "disk", rank=0) for fault in OF_FILES]
PASSING += [Case("a bit flipped after the seal", rank=0, backend="fsdp")]

LASTING = [
    Case("a bit flipped after the seal", times=ALWAYS),
    Case("a bit flipped after the seal", "tensor", times=ALWAYS),
    Case("a bucket dropped", times=ALWAYS),
    Case("a tensor renamed", times=ALWAYS),
    Case("all buckets of an older label", rank=None, times=ALWAYS),
    Case("all buckets of an older label", "tensor", rank=None, times=ALWAYS),
    Case("a bit flipped in a file", "disk", rank=0, times=ALWAYS),
]

SIGNALS = []
for name in ("SIGKILL", "SIGSTOP"):
    SIGNALS += [Case(f"{name} as it gathers", rank=rank) for rank in (2, 3)]
    SIGNALS += [Case(f"{name} as it prepares", rank=rank) for rank in (2, 3)]
    SIGNALS += [Case(f"{name} as it gathers", way, rank=3) for way in ("disk", "tensor")]
    SIGNALS += [Case(f"{name} as it gathers", rank=3, backend="fsdp")]

COMPARED = [
    Case("a bit flipped before the seal", way, compare_every=1) for way in ("broadcast", "tensor")
]

PROBED = [Case("a bucket of other values", way, probes=True) for way in ("broadcast", "tensor")]
PROBED += [
    Case("the weights of the step before", way, rank=None, probes=True)
    for way in ("broadcast", "disk")
]
PROBED += [Case("the files of another version", "disk", rank=0, probes=True)]


def told(case: Case) -> str:
    words = [case.transport, case.fault, f"rank {case.rank}", case.backend]
    if case.times == ALWAYS:
        words.append("always")
    return ", ".join(words)


@dataclass
class Stage:
    """Two engines and the model that they begin with."""

    engines: list[SGLangEngine]
    model: Path
    directory: Path

    def play(self, case: Case) -> tuple[Outcome, list[str]]:
        """The outcome, and what each engine has at the end. Requests that run meanwhile are all
        answered, as soon as each engine has whole weights again."""
        engines = self.engines
        for engine in engines:
            ready(engine, self.model)
        requests = Requests(engines)
        outcome = play(case, self.model, self.directory, engines, requests.start)
        gap = np.abs(np.array(outcome.old) - np.array(outcome.new)).max()
        assert gap > 1e-2, "an engine with other weights would not be seen"
        ends = [found(engine, outcome) for engine in engines]
        for engine in engines:
            if case.transport == "disk":
                engine.resume()
        if case.transport == "disk":
            ends = [found(engine, outcome) for engine in engines]
        for engine in engines:
            ready(engine, self.model)
        answers = requests.answers()
        assert [answer.status for answer in answers] == [Status.TRUNCATED] * 4
        assert {len(answer.token_ids) for answer in answers} == {NUM_TOKENS}
        message = outcome.error or "; ".join(outcome.lost.values()) or outcome.warnings
        print(f"\n| {told(case)} | {outcome.seconds:.1f} | {short(message)} | {', '.join(ends)} |")
        return outcome, ends


def short(message: str) -> str:
    """Without where logs are."""
    told = message.splitlines()[-1].rpartition("once more: ")[2] if message else ""
    return re.sub(r"; log: .*?; last line: [^;]*|; logs: .*", "", told)[:400]


@pytest.fixture
def stage(engines: list[SGLangEngine], tiny_model: Path, tmp_path: Path) -> Stage:
    return Stage(engines, tiny_model, tmp_path)


@pytest.mark.matrix
@pytest.mark.parametrize("case", PASSING, ids=told)
def test_a_fault_that_passes_is_named_and_the_engines_end_on_the_new_version(
    case: Case, stage: Stage
) -> None:
    """Where both engines refuse, all is sent once more; where one does, it is lost."""
    outcome, ends = stage.play(case)
    assert outcome.error == ""
    if case.transport == "tensor" and case.fault in OF_ONE_ENGINE:
        assert outcome.lost.keys() == {"engine-1"}
        assert re.search(NAMED[case.fault], outcome.lost["engine-1"])
        assert ends == ["2, new", "1, paused"]
    else:
        assert re.search(f"engine-0 .*{NAMED[case.fault]}", outcome.warnings)
        assert re.search(f"engine-1 .*{NAMED[case.fault]}", outcome.warnings)
        assert outcome.lost == {} and ends == ["2, new", "2, new"]


@pytest.mark.matrix
@pytest.mark.parametrize("case", LASTING, ids=told)
def test_a_fault_that_lasts_ends_the_run_and_nothing_is_served_between_two_versions(
    case: Case, stage: Stage
) -> None:
    """Engines that load files have not begun to load, and would serve the old version."""
    outcome, ends = stage.play(case)
    assert re.search(NAMED[case.fault], outcome.error)
    assert ends == (["1, old"] if case.transport == "disk" else ["1, paused"]) * 2


@pytest.mark.matrix
@pytest.mark.parametrize("case", SIGNALS, ids=told)
def test_a_rank_that_dies_or_hangs_is_named_and_nothing_is_served_between_two_versions(
    case: Case, stage: Stage
) -> None:
    outcome, ends = stage.play(case)
    if "SIGKILL" in case.fault:
        # Where others write files, one of them may be the first to say so.
        died = rf"^trainer rank {case.rank} died while asked to|{case.rank} did not exchange its"
        assert re.search(died, outcome.error)
        assert outcome.seconds < faulty_run.DEADLINE_S
    else:
        hangs = rf"trainer ranks (\d, )*{case.rank}(, \d)* (have not answered|did not)"
        assert re.search(hangs, outcome.error)
        if case.transport == "broadcast" and "gathers" in case.fault:
            assert re.search(r"trainer rank \d did not exchange its part of bucket", outcome.error)
        assert outcome.seconds < 4 * faulty_run.DEADLINE_S
    assert "of version 2" in outcome.error
    is_before_pause = "prepare" in case.fault or case.transport == "disk"
    assert ends == (["1, old"] if is_before_pause else ["1, paused"]) * 2


@pytest.mark.matrix
@pytest.mark.parametrize("case", COMPARED, ids=told)
def test_what_is_wrong_before_the_seal_is_seen_where_a_sync_compares(
    case: Case, stage: Stage
) -> None:
    outcome, ends = stage.play(case)
    message = "1 parameters of the engine were not what the trainer has: "
    assert outcome.error.count(message) == 2
    assert ends == ["2, paused", "2, paused"]


@pytest.mark.matrix
@pytest.mark.parametrize("case", PROBED, ids=told)
def test_whole_buckets_of_other_weights_are_seen_by_the_logprobs(case: Case, stage: Stage) -> None:
    outcome, _ = stage.play(case)
    for name in ("engine-0", "engine-1"):
        assert re.search(
            f"engine {name} gives 23 tokens .* version 2 of the weights", outcome.error
        )


@pytest.mark.matrix
def test_a_low_bit_that_is_wrong_before_the_seal_is_not_seen_without_comparing(
    stage: Stage,
) -> None:
    """Of it the trainer says that it is right, and it is too small for the logprobs."""
    outcome, ends = stage.play(Case("a bit flipped before the seal", probes=True))
    assert outcome.error == "" and ends == ["3, new", "3, new"]


@pytest.fixture
def one_rank_session(
    sglang_engine: SGLangEngine, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], SyncSession]]:
    """Makes sessions of a trainer in this process, whose senders may be faulty."""
    for owner, name in faulty_run.PATCHED:
        monkeypatch.setattr(owner, name, getattr(owner, name))
    meeting = f"tcp://127.0.0.1:{free_port('127.0.0.1')}"
    env = RankEnv(rank=0, world_size=1, local_rank=0, device="cpu", init_method=meeting)
    group = LocalTrainGroup(
        faulty_run.config("fsdp"), RunDir.create(tmp_path, "run"), tiny_model, env
    )
    group.setup()

    def opened(transport: str) -> SyncSession:
        session = SyncSession(
            group,
            EnginePool([sglang_engine]),
            SeparateDevices(),
            transport=transport,
            directory=tmp_path / "weights",
            deadline_s=faulty_run.DEADLINE_S,
        )
        session.open([[0]])
        session.sync(1)
        faulty_run.nudge(group._worker)
        return session

    yield opened
    group.close()


FEW = [
    Case("a bit flipped after the seal"),
    Case("two names exchanged"),
    Case("a bucket dropped", "tensor"),
    Case("a bit flipped in a file", "disk"),
]


@pytest.mark.parametrize("case", FEW, ids=told)
def test_the_only_engine_ends_on_the_new_version_after_a_fault_that_passes(
    case: Case,
    one_rank_session: Callable[[str], SyncSession],
    sglang_engine: SGLangEngine,
    caplog: pytest.LogCaptureFixture,
) -> None:
    session = one_rank_session(case.transport)
    faulty_run.arm(case)
    session.sync(2)
    assert re.search(f"once more: engine engine-0 .*{NAMED[case.fault]}", caplog.text)
    scored, version = sglang_engine.score(TOKENS)
    expected = session._ranks.call("score", TOKENS, what="score")[0]
    assert version == 2
    assert np.abs(np.array(scored) - np.array(expected)).max() < 1e-4
