"""What every entry of the table of engines keeps, and an engine that stands in no table."""

import subprocess
import sys
from pathlib import Path
from typing import ClassVar, get_args

import pytest

from nanoslime import layout
from nanoslime.config import ModelConfig, RolloutConfig, RunConfig, WeightSyncConfig
from nanoslime.config.rollout import ENGINES
from nanoslime.engine_kind import EngineKind, EngineStart, engine_kind, takes_slots
from nanoslime.models.shape import ModelShape
from nanoslime.plugins import target
from nanoslime.types import Engine, RunError
from tools.submit.plan_text import describe

ROOT = Path(__file__).parents[3]
TRANSPORTS = get_args(WeightSyncConfig.__annotations__["transport"])


@pytest.fixture(params=ENGINES)
def rollout(request: pytest.FixtureRequest) -> RolloutConfig:
    return RolloutConfig(engine=request.param)


def start(rollout: RolloutConfig, model: Path, log: Path) -> EngineStart:
    config = RunConfig(rollout=rollout, model=ModelConfig(dtype="float32"))
    return EngineStart(config, 0, model, device="cpu", host="127.0.0.1", log=log)


def test_a_kind_has_the_name_of_its_line(rollout: RolloutConfig) -> None:
    kind = engine_kind(rollout)
    assert isinstance(kind, EngineKind)
    assert kind.name == rollout.engine and kind.title


def test_a_kind_takes_weights_by_known_transports_of_which_disk_is_always_possible(
    rollout: RolloutConfig,
) -> None:
    transports = engine_kind(rollout).transports
    assert set(transports) < set(TRANSPORTS) - {"auto"}
    assert "disk" in transports


def test_a_kind_serves_a_small_model_on_one_slot(rollout: RolloutConfig, tiny_model: Path) -> None:
    kind = engine_kind(rollout)
    kind.check_options(rollout)
    kind.check_plan(rollout, ModelShape.read(tiny_model), slots_per_node=1)
    assert 0.0 <= kind.memory_fraction(RunConfig(rollout=rollout)) < 1.0


def test_recorded_rollouts_need_no_slots(rollout: RolloutConfig) -> None:
    recorded = RolloutConfig(engine=rollout.engine, load_rollouts="runs/a")
    assert takes_slots(rollout) == engine_kind(rollout).takes_slots
    assert not takes_slots(recorded)


def test_a_kind_names_what_owns_its_engine(
    rollout: RolloutConfig, tiny_model: Path, tmp_path: Path
) -> None:
    """An owner that never started its engine has nothing to end."""
    owner = engine_kind(rollout).make_owner(start(rollout, tiny_model, tmp_path / "engine.log"))
    owner.close()
    assert not list(tmp_path.iterdir())


def test_the_embedded_engine_starts_from_the_table(tiny_model: Path, tmp_path: Path) -> None:
    """The server's start is tested with the real SGLang in test_survival.py and
    everywhere else."""
    rollout = RolloutConfig(engine="embedded")
    owner = engine_kind(rollout).make_owner(start(rollout, tiny_model, tmp_path / "engine.log"))
    engine = owner.start(deadline_s=60)
    assert isinstance(engine, Engine)
    assert engine.policy_version() == 0
    owner.close()


def test_the_files_of_the_table_load_where_no_framework_exists() -> None:
    modules = [target(name, ENGINES, "").partition(":")[0] for name in ENGINES]
    heavy = ("torch", "transformers", "ray", "megatron", "sglang")
    code = f"""
import importlib, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {heavy!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)
sys.meta_path.insert(0, Blocked())
for name in {modules!r}:
    importlib.import_module(name)
print("loaded", len({modules!r}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, f"loaded {len(ENGINES)}\n"), done.stderr


def test_an_unknown_engine_is_refused_with_the_choices() -> None:
    message = "rollout.engine='vllm' is unknown; choose one of embedded, sglang"
    with pytest.raises(ValueError, match=message):
        RolloutConfig(engine="vllm")


class Third(EngineKind):
    """A third engine as a user would write it in a file of their own."""

    name: ClassVar[str] = "third"
    title: ClassVar[str] = "Third"
    takes_slots: ClassVar[bool] = True
    transports: ClassVar[tuple[str, ...]] = ("disk",)
    owner: ClassVar[str] = "nowhere:owner"

    def check_options(self, rollout: RolloutConfig) -> None: ...

    def check_plan(self, rollout: RolloutConfig, shape: ModelShape, slots_per_node: int) -> None:
        if rollout.engine_tp_size > 1:
            raise RunError("the third engine knows no tensor parallelism")

    def memory_fraction(self, config: RunConfig) -> float:
        return 0.5


def test_an_engine_outside_the_table_is_planned_by_its_own_checks(tiny_model: Path) -> None:
    shape = ModelShape.read(tiny_model)
    config = RunConfig(rollout=RolloutConfig(engine=f"{__name__}:Third"))
    planned = layout.plan(config, shape)
    assert len(planned.engines) == 1
    assert "Third: 1 of 1" in describe(config, shape, planned)
    cut = RunConfig(rollout=RolloutConfig(engine=f"{__name__}:Third", engine_tp_size=2))
    with pytest.raises(RunError, match="knows no tensor parallelism"):
        layout.plan(cut, shape)
