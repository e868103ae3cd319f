"""What a step leaves out: gradients that are too large, frozen parameters; in both
backends, on one rank.
"""

import math
from copy import deepcopy
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist

from nanoslime import algorithms
from nanoslime.algorithms.grpo import GRPO
from nanoslime.batch import TrainBatch
from nanoslime.config.algorithm import ALGORITHM_CONFIGS, CUSTOM, CorrectionConfig
from nanoslime.training import backend as backend_module
from nanoslime.training import skipping
from nanoslime.training.megatron.optimizer import optimizer_config
from nanoslime.types import RunError
from tests.models.hf import save_model
from tests.training.parity import (
    KL,
    LENGTHS,
    Layout,
    assemble,
    copied,
    grad_shards,
    make_backend,
    train_batch,
    values_of,
)
from tests.training.reference import make_step

pytestmark = pytest.mark.megatron


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.fixture(scope="module")
def batches(model_dir):
    return [train_batch(make_step(model_dir, number)) for number in range(2)]


@pytest.fixture(params=["fsdp", "megatron"])
def start(request, model_dir, tmp_path):
    """Makes backends of one rank, one after the other; the process group ends with the
    test.
    """
    made = []

    def make(layout=Layout, **changes):
        if dist.is_initialized():
            dist.destroy_process_group()
        made.append(tmp_path / f"rendezvous-{len(made)}")
        return make_backend(layout(backend=request.param), model_dir, 0, made[-1], **changes)

    yield make
    if dist.is_initialized():
        dist.destroy_process_group()


half = partial(Layout, dtype="bfloat16")


def parameters(backend):
    return assemble(copied(backend.weight_shards()))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def spiky(batch):
    return replace(batch, advantages=[100 * a for a in batch.advantages])


CORRECTIONS = [
    CorrectionConfig(),
    CorrectionConfig(use_tis=True, tis_clip=1.1, tis_clip_low=0.9, use_opsm=True),
    CorrectionConfig(reject="sequence", veto=0.65),
    CorrectionConfig(use_tis=True, tis_level="geometric", reject="token", reject_high=1.3),
]


# Every algorithm and every correction, and in the matrix each with each.
PAIRS = []
_NAMES = [name for name in ALGORITHM_CONFIGS if name != CUSTOM]
for _number, _name in enumerate(_NAMES):
    for _index, _correction in enumerate(CORRECTIONS):
        _marks = [] if _index == _number % len(CORRECTIONS) else [pytest.mark.matrix]
        PAIRS.append(pytest.param(_name, _correction, marks=_marks, id=f"{_name}-{_index}"))


@pytest.mark.parametrize(("name", "correction"), PAIRS)
def test_auto_trains_as_recomputed_without_the_pass(start, batches, name, correction):
    """The gradient and every metric, over the algorithms and what they may compare."""
    backend = start(lr=0.0, min_lr=0.0, clip_grad=0.0)
    algorithm = ALGORITHM_CONFIGS[name](
        correction=correction,
        use_kl_loss=True,
        kl_loss_coef=0.1,
        use_unbiased_kl=True,
        entropy_coef=0.01,
    )
    found = {}
    for old in ("auto", "recomputed"):
        run = Layout().config()
        run = replace(run, algorithm=replace(algorithm, old_logprobs=old))
        made = algorithms.make(run.training_algorithm)
        assert made.needs_old_logprobs == (old == "recomputed")
        batch = deepcopy(batches[0])
        batch.old_logprobs = None
        if made.needs_old_logprobs:
            batch.old_logprobs = backend.logprobs(batch, "policy")
        batch.token_advantages = made.token_advantages(batch, backend.all_sum)
        step = backend.train_step(batch, made)
        found[old] = (step, assemble(copied(grad_shards(backend))))
    (step, grads), (expected, expected_grads) = found["auto"], found["recomputed"]
    assert step.loss == pytest.approx(expected.loss, rel=1e-5, abs=1e-6)
    assert values_of(step) == pytest.approx(values_of(expected), rel=1e-5, abs=1e-6)
    for parameter, grad in expected_grads.items():
        difference = (grads[parameter] - grad).abs().max()
        assert difference <= 1e-5 * grad.abs().max() + 1e-8, parameter


def test_a_spike_is_skipped_counted_and_can_be_replayed(
    start, batches, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(skipping, "LEAST", 2)
    backend = start(skip_grad_norm_above=5.0)
    saved = tmp_path / "saved"
    backend.skipped_dir = tmp_path / "skipped"
    usual = [backend.train_step(batches[0], GRPO(KL)).grad_norm for _ in range(2)]
    saved.mkdir()
    backend.save(saved)
    before = parameters(backend)
    spike = backend.train_step(spiky(batches[1]), GRPO(KL))
    assert spike.skipped
    assert spike.num_skipped == 1
    assert spike.grad_norm > 5 * max(usual)
    assert f"step 2 skipped: gradient norm {spike.grad_norm:g}; its batch is kept" in caplog.text
    assert same(parameters(backend), before)
    good = backend.train_step(batches[1], GRPO(KL))
    assert not good.skipped and good.num_skipped == 1
    assert not torch.equal(parameters(backend)["model.norm.weight"], before["model.norm.weight"])

    again = start(skip_grad_norm_above=5.0)
    again.load(saved)  # with the norms to judge by
    (file,) = (tmp_path / "skipped").rglob("*.pt")
    assert file.relative_to(tmp_path).as_posix() == "skipped/step_2/rank_0.pt"
    assert again.train_step(TrainBatch.load(file), GRPO(KL)) == spike
    assert again.train_step(batches[1], GRPO(KL)) == good


def test_all_is_accepted_where_nobody_asked(start, batches, monkeypatch):
    monkeypatch.setattr(skipping, "LEAST", 1)
    backend = start()
    usual = backend.train_step(batches[0], GRPO(KL))
    spike = backend.train_step(spiky(batches[1]), GRPO(KL))
    assert spike.grad_norm > 10 * usual.grad_norm
    assert not spike.skipped


def test_only_the_first_skipped_batches_are_kept(start, batches, tmp_path, monkeypatch):
    monkeypatch.setattr(backend_module, "MAX_KEPT", 2)
    backend = start()
    backend.skipped_dir = tmp_path / "skipped"
    broken = replace(batches[0], advantages=[math.nan] * len(LENGTHS))
    assert [backend.train_step(broken, GRPO(KL)).num_skipped for _ in range(3)] == [1, 2, 3]
    assert sorted(path.name for path in (tmp_path / "skipped").iterdir()) == ["step_0", "step_1"]


def test_a_batch_comes_back_from_its_file_as_it_was(batches, tmp_path):
    batch = replace(batches[0], token_advantages=[torch.randn(n) for n in LENGTHS])
    batch.save(tmp_path / "new" / "batch.pt")
    again = TrainBatch.load(tmp_path / "new" / "batch.pt")
    for name in TrainBatch.__dataclass_fields__:
        a = getattr(batch, name)
        b = getattr(again, name)
        if isinstance(a, list) and isinstance(a[0], torch.Tensor):
            assert all(
                torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True)
            ), name
        else:
            assert a == b, name


def moved(backend, before):
    """Names of what is no longer as it was, bit for bit."""
    after = parameters(backend)
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    "changes", [{}, {"recompute": True}, {"distributed_optimizer": True}], ids=str
)
def test_frozen_parameters_stay_and_the_others_have_the_gradients_of_before(
    start, batches, changes
):
    """Decay and clipping included: with all trained, the norm is larger."""
    whole = start(clip_grad=0.0, **changes)
    norm = whole.train_step(batches[0], GRPO(KL)).grad_norm
    expected = None if "distributed_optimizer" in changes else assemble(copied(grad_shards(whole)))
    backend = start(
        freeze=["embed_tokens", r"layers\.[01]\.mlp", r"layers\.2\.self_attn\."],
        clip_grad=0.0,
        **changes,
    )
    before = parameters(backend)
    frozen = {
        n for n in before if "embed" in n or ".0.mlp" in n or ".1.mlp" in n or ".2.self_attn." in n
    }
    step = backend.train_step(batches[0], GRPO(KL))
    assert moved(backend, before) == before.keys() - frozen
    assert len(frozen) == 1 + 3 + 3 + 6
    assert 0 < step.grad_norm < norm
    if expected:
        grads = assemble(copied(grad_shards(backend)))
        assert grads.keys() == before.keys() - frozen
        for name, grad in grads.items():
            assert (grad - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name
        squares = sum(float(grad.double().square().sum()) for grad in grads.values())
        assert step.grad_norm == pytest.approx(math.sqrt(squares), rel=1e-6)


def test_a_checkpoint_of_a_run_with_frozen_parameters_continues_exactly(start, batches, tmp_path):
    first = start(freeze=["mlp", "embed"])
    first.train_step(batches[0], GRPO(KL))
    (tmp_path / "saved").mkdir()
    first.save(tmp_path / "saved")
    expected = first.train_step(batches[1], GRPO(KL))
    weights = parameters(first)
    second = start(freeze=["mlp", "embed"])
    second.load(tmp_path / "saved")
    assert second.train_step(batches[1], GRPO(KL)) == expected
    assert same(parameters(second), weights)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ["mlp", "mlp.gate_prj"],
            r"'mlp.gate_prj' is found in no tensor.*did you mean .*mlp.gate_proj",
        ),
        ([""], "leaves none of .* tensors to train"),
    ],
)
def test_patterns_without_sense_are_refused(start, patterns, message):
    with pytest.raises(RunError, match=message):
        start(freeze=patterns)


def test_a_pattern_that_is_no_regular_expression_is_refused():
    with pytest.raises(ValueError, match=r"'mlp\(' is not a regular expression"):
        Layout().config(freeze=["mlp("])


def test_an_offloaded_fsdp_optimizer_makes_the_same_steps(start, batches, tmp_path, request):
    if request.node.callspec.params["start"] == "megatron":
        with pytest.raises(
            ValueError, match="offload=true: Megatron's needs CUDA, Transformer Engine"
        ):
            start(optimizer_offload=True)
        return
    backend = start()
    expected = [backend.train_step(batch, GRPO(KL)) for batch in batches]
    expected_parameters = parameters(backend)
    offloaded = start(optimizer_offload=True)
    steps = [offloaded.train_step(batches[0], GRPO(KL))]
    (tmp_path / "saved").mkdir()
    offloaded.save(tmp_path / "saved")
    again = start(optimizer_offload=True)
    again.load(tmp_path / "saved")
    steps.append(again.train_step(batches[1], GRPO(KL)))
    assert steps == expected
    assert same(parameters(again), expected_parameters)


def test_an_offloaded_megatron_optimizer_is_configured_as_megatron_core_wants_it():
    options = optimizer_config(Layout().config(optimizer_offload=True, distributed_optimizer=True))
    assert options.optimizer_cpu_offload
    assert options.optimizer_offload_fraction == 1.0
    assert options.use_precision_aware_optimizer == bool(find_spec("transformer_engine"))
    assert not optimizer_config(Layout().config()).optimizer_cpu_offload


def test_megatrons_optimizer_has_the_settings_of_the_run():
    changes = dict(lr=0.5, weight_decay=0.25, adam_beta1=0.6, adam_beta2=0.7, adam_eps=0.1)
    for distributed in (True, False):
        options = optimizer_config(Layout().config(distributed_optimizer=distributed, **changes))
        assert options.use_distributed_optimizer == distributed
        assert {name: getattr(options, name) for name in changes} == changes
        assert options.clip_grad == 0.0, "TrainBackend clips"


def cosine(a, b):
    x, y = (
        torch.cat([tensors[name].flatten() for name in sorted(tensors)]).double()
        for tensors in (a, b)
    )
    return float(torch.nn.functional.cosine_similarity(x, y, dim=0))


@pytest.mark.parametrize(
    "options", [{}, {"distributed_optimizer": True}, {"recompute": True}], ids=str
)
def test_bfloat16_sums_gradients_in_float32_and_steps_as_float32_does(start, batches, options):
    gradients = []
    updates = []
    norms = []
    for layout in (Layout, half):
        backend = start(layout, **options | {"lr": 0.1})
        before = parameters(backend)
        steps = [backend.train_step(batch, GRPO(KL)) for batch in batches]
        norms.append(steps[0].grad_norm)
        shards = list(grad_shards(backend))
        assert {shard.tensor.dtype for shard in shards} == {torch.float32}
        gradients.append(assemble(copied(shards)))
        after = parameters(backend)
        updates.append({name: after[name] - before[name] for name in after})
    assert norms[1] == pytest.approx(norms[0], rel=0.05)
    assert norms[1] != norms[0]
    assert cosine(*gradients) > 0.95 and cosine(*updates) > 0.95


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("layout", [Layout, half], ids=["float32", "bfloat16"])
def test_a_checkpoint_from_before_the_first_step_takes_back_all_progress(
    start, batches, tmp_path, layout, distributed
):
    options = {"layout": layout, "distributed_optimizer": distributed}
    backend = start(**options)
    (tmp_path / "saved").mkdir()
    backend.save(tmp_path / "saved")
    expected = backend.train_step(batches[0], GRPO(KL))
    after = parameters(backend)
    again = start(**options)
    again.train_step(batches[1], GRPO(KL))
    again.load(tmp_path / "saved")
    assert again._history == skipping.StepHistory()
    assert again.train_step(batches[0], GRPO(KL)) == expected
    assert same(parameters(again), after)
