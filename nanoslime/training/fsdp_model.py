"""A transformers causal LM as FSDP2 shards, built without memory: a rank reads its own rows of the files."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from nanoslime.batch import MicroBatch
from nanoslime.config.run import RunConfig
from nanoslime.models.freezing import frozen_names
from nanoslime.storage.safetensors_file import read_headers
from nanoslime.training.logprobs import token_logprobs
from nanoslime.types import RunError

# settings of models that do more to the hidden states than multiply them with the output weight
_LOGITS_ARE_CHANGED_BY = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
)


class Policy(torch.nn.Module):
    """A causal LM whose forward gives logprobs; as the root of FSDP it has the output weight whole."""

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        super().__init__()
        self.causal_lm, config = causal_lm, causal_lm.config.get_text_config()
        self.vocab_size, head = config.vocab_size, causal_lm.get_output_embeddings()
        changed = [
            name
            for name in _LOGITS_ARE_CHANGED_BY
            if getattr(config, name, None) not in (None, 1.0)
        ]
        if changed or not isinstance(head, torch.nn.Linear) or head.bias is not None:
            what = changed[0] if changed else f"an output layer that is {head}"
            raise RunError(
                f"{type(causal_lm).__name__} has {what}: its logits are no product with a weight"
            )

    def forward(
        self, batch: MicroBatch, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """[T] each, as token_logprobs has it."""
        # Without a mask, transformers separates packed sequences where the positions start again.
        pack = {"input_ids": batch.token_ids[None], "position_ids": batch.positions[None]}
        hidden = self.causal_lm.get_decoder()(**pack, use_cache=False).last_hidden_state[0]
        weight = self.causal_lm.get_output_embeddings().weight
        return token_logprobs(
            hidden,
            weight,
            batch.token_ids,
            batch.cu_seqlens,
            temperature=batch.temperature,
            vocab_size=self.vocab_size,
            with_entropy=with_entropy,
        )


def build_sharded(
    model_dir: Path, config: RunConfig, mesh: DeviceMesh, device: torch.device
) -> Policy:
    """The model of `model_dir`, sharded over `mesh` by decoder layer, with float32 parameters from its files.

    Gradients are summed over the mesh, not averaged: losses are divided by global denominators beforehand.
    Raises RunError where tensors of model and files differ in name or shape, and as frozen_names does.
    """
    half, trusted = config.model.dtype == "bfloat16", config.model.trust_remote_code
    flash = half and device.type == "cuda" and is_flash_attn_2_available()
    hf_config = AutoConfig.from_pretrained(model_dir, trust_remote_code=trusted)
    text_config = hf_config.get_text_config()
    for (
        name,
        value,
    ) in text_config.to_dict().items():  # old and current logprobs must be the same function
        if ("drop" in name or "jitter" in name) and isinstance(value, float):
            setattr(text_config, name, 0.0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            hf_config,
            dtype=torch.float32,
            trust_remote_code=trusted,
            attn_implementation="flash_attention_2" if flash else "sdpa",
        )
    model.eval()
    if config.training.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()  # transformers recomputes in training mode only
    parameters = dict(model.named_parameters())
    for name in frozen_names(config.training.freeze, parameters):
        parameters[name].requires_grad_(False)
    policy, home = Policy(model), device
    options = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)} if half else {}
    if config.training.optimizer_offload:
        home = torch.device("cpu")
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    _shard(policy, mesh, options)
    model.to_empty(device=home)
    _fill_buffers(model)
    _load_weights(model, model_dir)
    for buffer in model.buffers():  # they are whole on each rank, and stay on the device
        buffer.data = buffer.to(device)
    return policy


def local_rows(param: DTensor) -> slice:
    """The rows (dimension 0) of this rank. Cut as torch.chunk does: the last ranks may have fewer or none."""
    mesh, size = param.device_mesh, param.shape[0]
    rows_per_rank = -(-size // mesh.size())
    start = min(mesh.get_local_rank() * rows_per_rank, size)
    return slice(start, min(start + rows_per_rank, size))


def _shard(policy: Policy, mesh: DeviceMesh, options: dict[str, Any]) -> None:
    # The root reshards too: parameters left whole after a forward would hide a swap to the reference weights.
    for module in (*policy.causal_lm.get_decoder().layers, policy):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, **options)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has neither AVG nor PREMUL_SUM


@torch.no_grad()
def _fill_buffers(model: PreTrainedModel) -> None:
    """Computes what no file holds, such as the rotary inv_freq. RunError where a buffer stays undefined."""
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.fill_(torch.nan)
    for module in model.modules():
        if any(True for _ in module.buffers(recurse=False)):
            model._init_weights(module)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and buffer.isnan().any():
            what = f"buffer {name} of {type(model).__name__}"
            raise RunError(f"transformers does not say how {what} is computed")


@torch.no_grad()
def _load_weights(model: PreTrainedModel, model_dir: Path) -> None:
    params = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - params.keys()
    tensors = read_headers(model_dir)
    if missing := sorted(params.keys() - tensors.keys()):
        raise RunError(
            f"{model_dir} has no {missing[0]} ({len(missing)} missing) for {type(model).__name__}"
        )
    if unexpected := sorted(tensors.keys() - params.keys() - tied):
        name = unexpected[0]
        held = f"{tensors[name].file} holds {name} ({len(unexpected)} such)"
        raise RunError(f"{held}, unknown to {type(model).__name__}")
    names_by_file: dict[Path, list[str]] = defaultdict(list)
    for name, param in params.items():
        if tensors[name].shape != tuple(param.shape):
            shapes = f"{list(tensors[name].shape)}, the model needs {list(param.shape)}"
            raise RunError(f"{tensors[name].file}: {name} has shape {shapes}")
        names_by_file[tensors[name].file].append(name)
    for file, names in names_by_file.items():
        with safe_open(file, framework="pt") as opened:
            for name in names:
                rows = local_rows(params[name])
                if rows.start < rows.stop:
                    params[name].to_local().copy_(opened.get_slice(name)[rows])
