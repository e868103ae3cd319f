"""Logits of the real GPTModel, from Hugging Face or torch_dist files.

They are computed in one process, on the CPU, in float32.
"""

import re
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import Tensor

from nanoslime.models.rules import ModelPartition
from nanoslime.models.shape import ModelShape
from nanoslime.training.megatron import cpu_compat, weights
from nanoslime.training.megatron.context_parallel import ContextParallelShard
from nanoslime.training.megatron.model import gpt_model, model_config
from nanoslime.training.megatron.packed_sequences import packed_inputs


@torch.no_grad()
def logits(shape: ModelShape, directory: Path, tokens: Tensor) -> Tensor:
    """[T, vocab_size] for one sequence of `tokens` [T].

    It makes process groups of its own and ends them.

    Raises ValueError for a model that megatron-core cannot compute, and whatever
    loading raises for bad files.
    """
    cpu_compat.install()
    cpu = torch.device("cpu")
    settings = model_config(shape, torch.float32, cpu)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel_state.destroy_model_parallel()  # of an earlier backend in this process
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(0, force_reset_rng=True)
        gpt = gpt_model(shape, settings, cpu, first=True, last=True).eval()
        if (directory / "metadata.json").exists():
            load_torch_dist(gpt, directory)
        else:
            parameter_pieces = weights.bind(gpt, shape, ModelPartition())
            weights.load(parameter_pieces, shape, directory)
        cp_group = parallel_state.get_context_parallel_group()
        cp_shard = ContextParallelShard([len(tokens)], cp_group, 1, cpu)
        padded = gpt(**packed_inputs(tokens, cp_shard, local_spec=True))
        return padded[0, :, : shape.vocab_size]  # of [1, T, padded vocabulary]
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def load_torch_dist(gpt: GPTModel, directory: Path) -> None:
    """Loads this rank's part of the weights; collective.

    megatron-core reads them in the layout that their names in the files show.

    Raises megatron-core's CheckpointingException where one is missing.
    """
    keys = dist_checkpointing.load_tensors_metadata(str(directory)).keys()
    layout = {
        "non_homogeneous_layers": any(re.match(r"decoder\.layers\.\d", key) for key in keys),
        "singleton_local_shards": any(key.endswith("linear_fc1.weight_w") for key in keys),
    }
    wanted = {}
    fp8_state: dict[str, None] = {}  # FP8's state is not in every file, and float32 needs none
    for key, value in gpt.sharded_state_dict(metadata=layout).items():
        if key.endswith("_extra_state"):
            fp8_state[key] = None
        else:
            wanted[key] = value
    loaded = dist_checkpointing.load({"model": wanted}, str(directory))["model"]
    gpt.load_state_dict({**loaded, **fp8_state})
