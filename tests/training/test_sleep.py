"""A trainer rank that slept: its memory was really given back, and it trains on as if
nothing had been.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanoslime.algorithms.grpo import GRPO
from nanoslime.plugins import resolve
from nanoslime.training.backend import RankEnv, TrainBackend
from nanoslime.training.sleep import DeviceMemory
from tests.models.hf import save_model
from tests.training.parity import BACKENDS, KL, Layout, train_batch
from tests.training.rank_pool import RankPool
from tests.training.reference import make_step

MIB = 1 << 20
megatron = pytest.mark.megatron


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("small"), "qwen3")


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("experts"), "qwen3_moe")


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """27 million parameters: 103 MiB in float32."""
    sizes = dict(hidden_size=320, vocab_size=40_000, intermediate_size=640)
    return save_model(tmp_path_factory.mktemp("large"), "qwen3_untied", **sizes)


@pytest.fixture(scope="module")
def alone() -> Iterator[RankPool]:
    """Of its own: nothing that other tests left is in its memory."""
    pool = RankPool(1)
    yield pool
    pool.close()


def rss_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def make_backend(layout: Layout, model_dir: Path, env: RankEnv) -> TrainBackend:
    backend = resolve(layout.backend, BACKENDS, "backend")
    return backend(layout.config(), model_dir, env)


def state(backend: TrainBackend) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in backend._live_tensors()[0]]


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(a.equal(b) for a, b in zip(ours, theirs, strict=True))


def life(
    env, layout: Layout, model_dir, steps, sleeps: int
) -> tuple[list, list[torch.Tensor], bool]:
    """Two steps, so many sleeps before each; metrics, the state at the end, whether no
    sleep changed it.
    """
    backend = make_backend(layout, model_dir, env)
    metrics = []
    same = True
    for step in steps:
        batch = train_batch(step, backend.dp_rank, backend.dp_size, layout.sequences)
        for _ in range(sleeps):
            before = state(backend)
            backend.sleep()
            backend.wake()
            same &= equal(before, state(backend))
            backend.logprobs(batch, "policy")
        metrics.append(backend.train_step(batch, GRPO(KL)))
    return metrics, state(backend), same


DISTRIBUTED = (("distributed_optimizer", True),)


@pytest.mark.parametrize(
    "layout",
    [
        Layout("fsdp", dp_size=2),
        pytest.param(Layout("megatron", tp_size=2), marks=megatron),
        pytest.param(Layout("megatron", dp_size=2, options=DISTRIBUTED), marks=megatron),
        pytest.param(Layout("megatron", pp_size=2, dtype="bfloat16"), marks=megatron),
        pytest.param(
            Layout("megatron", dp_size=2, options=DISTRIBUTED, dtype="bfloat16"), marks=megatron
        ),
        pytest.param(Layout("megatron", pp_size=2, vpp_size=2, sequences=2), marks=megatron),
        pytest.param(
            Layout("megatron", dp_size=2, options=(*DISTRIBUTED, ("ep_size", 2)), dtype="bfloat16"),
            marks=megatron,
        ),
    ],
    ids=str,
)
def test_sleep_changes_no_bit_and_no_later_step(two_ranks, small, experts, layout):
    model = experts if ("ep_size", 2) in layout.options else small
    steps = [make_step(model, number) for number in range(2)]
    plain, slept = (two_ranks(life, layout, model, steps, sleeps) for sleeps in (0, 2))
    for (metrics, end, _), (metrics_slept, end_slept, same) in zip(plain, slept, strict=True):
        assert same and metrics_slept == metrics
        assert len(end) > 10
        assert equal(end, end_slept)


def resident(env, layout: Layout, model_dir, step) -> dict[str, float]:
    """MiB of this process before, asleep and awake again, and of what is kept and
    cleared.
    """
    backend = make_backend(layout, model_dir, env)
    backend.train_step(train_batch(step), GRPO(KL))
    found = {"before": rss_mib()}
    backend.sleep()
    found["asleep"] = rss_mib()
    backend.wake()
    backend.train_step(train_batch(step), GRPO(KL))
    return found | {"awake": rss_mib()}


@pytest.mark.parametrize(
    "layout",
    [Layout("fsdp"), pytest.param(Layout("megatron", options=DISTRIBUTED), marks=megatron)],
)
def test_memory_of_a_sleeping_rank_is_really_given_back(alone, large, layout):
    """Weights, gradients and two moments are 4 x 103 MiB; the reference's weights remain."""
    [mib] = alone(resident, layout, large, make_step(large, 0))
    assert mib["asleep"] < mib["before"] - 0.9 * 4 * 103
    assert mib["awake"] < mib["before"] + 50


def twice(env, model_dir) -> tuple[str, str]:
    backend = make_backend(Layout("fsdp"), model_dir, env)
    with pytest.raises(AssertionError) as too_early:
        backend.wake()
    backend.sleep()
    with pytest.raises(AssertionError) as twice:
        backend.sleep()
    return str(too_early.value), str(twice.value)


def test_sleep_and_wake_alternate(alone, small):
    [(too_early, again)] = alone(twice, small)
    assert "not asleep" in too_early and "asleep already" in again


class Operations(TorchDispatchMode):
    """Names of all operations inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def swaps(env, layout: Layout, model_dir, step) -> tuple[set[str], bool, bool]:
    """Operations of taking the reference in and out again, before and after a sleep;
    whether the policy is as it was, and whether it was the reference in between.
    """
    backend = make_backend(layout, model_dir, env)
    first = [p.clone() for p in backend._parameters()]
    backend.train_step(train_batch(step), GRPO(KL))
    trained = [p.clone() for p in backend._parameters()]
    operations = Operations()
    for _ in range(2):
        with operations:
            inside = backend._weights("ref")
            inside.__enter__()
        was_reference = equal(backend._parameters(), first)
        with operations:
            inside.__exit__(None, None, None)
        backend.sleep()
        backend.wake()
    same = equal(backend._parameters(), trained)
    return operations.names, same, was_reference and not equal(first, trained)


@pytest.mark.parametrize(
    "layout",
    [
        Layout("fsdp"),
        Layout("fsdp", options=(("optimizer_offload", True),)),
        pytest.param(Layout("megatron", options=DISTRIBUTED), marks=megatron),
    ],
    ids=str,
)
def test_the_reference_takes_the_policys_place_without_new_tensors(alone, small, layout):
    """The policy waits on the host, in memory that was taken once: a copy beside it would
    fill the device.
    """
    [(names, same, was_reference)] = alone(swaps, layout, small, make_step(small, 0))
    assert same and was_reference
    assert "_foreach_copy_" in names or "copy_" in names
    for name in names:
        assert not any(word in name for word in ("clone", "empty", "_to_copy"))


def test_what_is_not_kept_comes_back_as_zeros():
    """Whatever was in the memory that it gets."""
    kept = torch.arange(16.0)
    cleared = torch.ones(16)
    memory = DeviceMemory(torch.device("cpu"))
    memory.release([kept], [cleared])
    used = [torch.full((16,), 7.0) for _ in range(64)]
    del used
    memory.restore()
    assert kept.tolist() == list(range(16))
    assert cleared.tolist() == [0.0] * 16
