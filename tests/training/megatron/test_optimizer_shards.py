"""The distributed optimizer's state in a checkpoint: each rank its own boxes, no gather, and the
tensors of megatron-core's fully reshardable format.
"""

import math
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed import checkpoint as dcp

from nanoslime.algorithms.grpo import GRPO
from nanoslime.storage import manifest
from nanoslime.training.megatron import checkpoint
from nanoslime.training.megatron.backend import MegatronBackend
from nanoslime.training.megatron.optimizer_shards import boxes, ranges
from tests.models.hf import save_model
from tests.training.parity import KL, Layout, train_batch
from tests.training.reference import make_step

pytestmark = pytest.mark.megatron


@pytest.mark.parametrize("shape", [(7,), (3, 4), (1, 5), (2, 3, 4), (3, 1, 2)])
def test_a_flat_range_is_cut_into_boxes_in_order(shape):
    whole = torch.arange(math.prod(shape)).view(shape)
    for start, stop in product(range(whole.numel()), range(1, whole.numel() + 1)):
        if start >= stop:
            continue
        found = []
        for offset, size in boxes(shape, start, stop):
            box = tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))
            found.append(whole[box].flatten())
        assert torch.cat(found).tolist() == list(range(start, stop))
        assert len(found) <= 2 * len(shape) - 1


DISTRIBUTED = (("distributed_optimizer", True),)
DP2 = Layout(dp_size=2, options=DISTRIBUTED)
GATHERED = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
    "non_homogeneous_layers": True,
}


def same_optimizers(first: MegatronBackend, second: MegatronBackend, names: list[str]) -> bool:
    """Whether main parameters, and what their state has by these names, are the same bits."""
    same = True
    pairs = zip(
        first._optimizer.chained_optimizers, second._optimizer.chained_optimizers, strict=True
    )
    for ours, theirs in pairs:
        for a, b in zip(ours.get_parameters(), theirs.get_parameters(), strict=True):
            same &= a.equal(b)
            for name in names:
                same &= ours.optimizer.state[a][name].equal(theirs.optimizer.state[b][name])
    return same


def trained(env, layout, model_dir, step, times: int) -> MegatronBackend:
    backend = MegatronBackend(layout.config(), model_dir, env)
    for _ in range(times):
        batch = train_batch(step, backend.dp_rank, backend.dp_size, layout.sequences)
        backend.train_step(batch, GRPO(KL))
    return backend


def make(env, path: Path) -> None:
    if env.rank == 0:
        path.mkdir()
    dist.barrier()


def gathered_state(backend: MegatronBackend, *, is_loading: bool) -> dict:
    """As megatron-core saves by itself: it gathers the optimizer's state on one rank."""
    weights = {0: backend._model_chunks[0].sharded_state_dict(metadata=dict(GATHERED))}
    moments = {}
    for number, inner in enumerate(backend._optimizer.chained_optimizers):
        moments[number] = inner.sharded_state_dict(
            weights, is_loading=is_loading, metadata=dict(GATHERED)
        )
    return {"model": weights, "optimizer": moments}


def reads_the_gathered_form(env, layout, model_dir, step, path) -> bool:
    first = trained(env, layout, model_dir, step, 2)
    make(env, path)
    contents = gathered_state(first, is_loading=False)
    contents |= checkpoint._sharded_state(first._trained, is_loading=False) | {
        "optimizer": contents["optimizer"]
    }
    contents |= {"layout": checkpoint._layout(first._ranks)}
    contents["step_history"] = {"optimizer_step": 2, "num_skipped": 0}
    dist_checkpointing.save(
        contents, str(path), checkpoint.InProcessWriter(), content_metadata=GATHERED
    )
    second = trained(env, layout, model_dir, step, 1)
    second.load(path)
    return same_optimizers(first, second, ["exp_avg", "exp_avg_sq", "step"])


def is_read_by_megatron(env, layout, model_dir, step, path) -> bool:
    first = trained(env, layout, model_dir, step, 2)
    make(env, path)
    first.save(path)
    second = trained(env, layout, model_dir, step, 1)
    wanted = gathered_state(second, is_loading=True)
    loaded = dist_checkpointing.load(wanted, str(path))
    for inner, own in zip(
        second._optimizer.chained_optimizers, loaded["optimizer"].values(), strict=True
    ):
        for parameter_state in inner.optimizer.state.values():
            del parameter_state["step"]
        with torch.no_grad():
            inner.load_parameter_state_from_fully_reshardable(own["param_state"])
    return same_optimizers(first, second, ["exp_avg", "exp_avg_sq"])


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    model_dir = save_model(tmp_path_factory.mktemp("model"), "qwen3")
    return model_dir, make_step(model_dir, 0)


@pytest.mark.parametrize("check", [reads_the_gathered_form, is_read_by_megatron])
def test_it_is_the_same_format_as_megatrons(two_ranks, problem, tmp_path, check):
    assert two_ranks(check, DP2, *problem, tmp_path / "saved") == [True, True]


def written(env, layout, model_dir, step, path) -> tuple[dict[str, str], int]:
    """The hashes of this rank's files, and the bytes of its optimizer's state."""
    backend = trained(env, layout, model_dir, step, 1)
    make(env, path)
    backend.save(path)
    num_bytes = 0
    for inner in backend._optimizer.chained_optimizers:
        for part in ranges(inner):
            num_bytes += sum(value.nbytes for value in part.state.values())
    return manifest.hash_own(path, env.rank), num_bytes


def test_each_rank_writes_and_hashes_its_own_state_and_a_share_of_the_weights(
    two_ranks, problem, tmp_path
):
    path = tmp_path / "saved"
    (first, first_bytes), (second, second_bytes) = two_ranks(written, DP2, *problem, path)
    manifest.write(path, first | second)
    manifest.verify(path)
    assert (
        first.keys().isdisjoint(second)
        and len(first) + len(second)
        == len([file for file in path.rglob("*") if file.is_file()]) - 1
    )
    metadata = dcp.FileSystemReader(path).read_metadata()
    sizes = {"__0_0.distcp": {}, "__1_0.distcp": {}}
    for index, place in metadata.storage_data.items():
        kind = index.fqn.startswith("optimizer.")
        of_file = sizes[place.relative_path]
        of_file[kind] = of_file.get(kind, 0) + place.length
    for of_file, num_bytes in zip(sizes.values(), (first_bytes, second_bytes), strict=True):
        assert of_file[True] > num_bytes > 0
    weights = [of_file[False] for of_file in sizes.values()]
    assert max(weights) < 2 * min(weights)
