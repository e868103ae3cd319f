"""A transformers causal LM as FSDP2 shards: each rank reads its own rows of the files."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules.dropout import _DropoutNd
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from nanoslime.batch import MicroBatch
from nanoslime.config.run import RunConfig
from nanoslime.models.checkpoint_files import check_tied_head, float_tensors
from nanoslime.models.freezing import frozen_names
from nanoslime.training.flash_attention import Pack
from nanoslime.training.logprobs import token_logprobs
from nanoslime.training.packed_attention import PACKED, choose_attention
from nanoslime.types import RunError

# settings of models that do more to the hidden states than multiply them with the output
# weight
_LOGITS_ARE_CHANGED_BY = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
)


class Policy(torch.nn.Module):
    """A causal LM whose forward gives logprobs; as the root of FSDP it has the output
    weight whole.

    Raises RunError for a model whose logits are not the product of hidden states and one
    weight.
    """

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self._attention = choose_attention(causal_lm)
        config = causal_lm.config.get_text_config()
        self.vocab_size = config.vocab_size
        model_name = type(causal_lm).__name__
        for name in _LOGITS_ARE_CHANGED_BY:
            value = getattr(config, name, None)
            if value not in (None, 1.0):
                raise RunError(
                    f"{model_name} has {name}={value} in its config.json: its logits are not the"
                    " product of hidden states and a weight, which the fsdp backend computes"
                )
        head = causal_lm.get_output_embeddings()
        if not isinstance(head, torch.nn.Linear) or head.bias is not None:
            raise RunError(
                f"{model_name} has an output layer that is {head}: its logits are not the"
                " product of hidden states and a weight, which the fsdp backend computes"
            )

    def forward(
        self, batch: MicroBatch, with_entropy: bool = False, only: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logprobs [T] and, where asked, entropies [T] of the tokens of `batch`, or of
        `only` some, as `token_logprobs` gives.
        """
        options = {}
        if self._attention == PACKED:
            options["packed_sequences"] = Pack(batch.lengths, batch.cu_seqlens)
        # Other ways of attention separate sequences where the positions start again.
        output = self.causal_lm.get_decoder()(
            input_ids=batch.token_ids[None],
            position_ids=batch.positions[None],
            use_cache=False,
            **options,
        )
        hidden = output.last_hidden_state[0]
        weight = self.causal_lm.get_output_embeddings().weight
        return token_logprobs(
            hidden,
            weight,
            batch.token_ids,
            batch.cu_seqlens,
            temperature=batch.temperature,
            vocab_size=self.vocab_size,
            with_entropy=with_entropy,
            only=only,
        )


def build_sharded(
    model_dir: Path, config: RunConfig, mesh: DeviceMesh, device: torch.device
) -> Policy:
    """The model of `model_dir`, sharded over `mesh` by decoder layer, in float32.

    Gradients are summed over the mesh, not averaged: losses are divided by global
    denominators beforehand. Raises RunError where tensors of model and files differ in
    name or shape, and as frozen_names does.
    """
    half = config.model.dtype == "bfloat16"
    model = _build_on_meta(model_dir, config)
    parameters = dict(model.named_parameters())
    for name in frozen_names(config.training.freeze, parameters):
        parameters[name].requires_grad_(False)
    policy = Policy(model)
    options: dict[str, Any] = {}
    if half:
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    home = device
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


def _build_on_meta(model_dir: Path, config: RunConfig) -> PreTrainedModel:
    """The model of `model_dir` without memory; in training mode only where it recomputes."""
    trusted = config.model.trust_remote_code
    hf_config = AutoConfig.from_pretrained(model_dir, trust_remote_code=trusted)
    _set_dropout_to_zero(hf_config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            hf_config, dtype=torch.float32, trust_remote_code=trusted
        )
    model.eval()
    if config.training.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()  # transformers recomputes in training mode only
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0  # a model may have a probability that no setting names
        if isinstance(module, torch.nn.Embedding):
            # Where config.json names a pad token, its row would get no gradient. Packed
            # sequences have no padding: such a token is text, as it is to Megatron.
            module.padding_idx = None
    return model


def _set_dropout_to_zero(hf_config: PretrainedConfig) -> None:
    """Sets dropout and router jitter to 0, also where functions are called with them.

    Old and current logprobs must be the same function of the weights.
    """
    text_config = hf_config.get_text_config()
    for name, value in text_config.to_dict().items():
        if ("drop" in name or "jitter" in name) and isinstance(value, float):
            setattr(text_config, name, 0.0)


def rows_of(param: DTensor, rank: int) -> slice:
    """The rows (dimension 0) of a rank, as torch.chunk cuts; the last may have none."""
    num_rows = param.shape[0]
    rows_per_rank = -(-num_rows // param.device_mesh.size())
    start = min(rank * rows_per_rank, num_rows)
    stop = min(start + rows_per_rank, num_rows)
    return slice(start, stop)


def _shard(policy: Policy, mesh: DeviceMesh, options: dict[str, Any]) -> None:
    # The root reshards too: parameters left whole after a forward would hide a swap to
    # the reference weights.
    for module in (*policy.causal_lm.get_decoder().layers, policy):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, **options)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has neither AVG nor PREMUL_SUM


@torch.no_grad()
def _fill_buffers(model: PreTrainedModel) -> None:
    """Computes what no file holds, for example the rotary inv_freq.

    Raises RunError where a buffer stays undefined.
    """
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.fill_(torch.nan)
    for module in model.modules():
        own_buffers = list(module.buffers(recurse=False))
        if own_buffers:
            model._init_weights(module)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and buffer.isnan().any():
            raise RunError(
                f"transformers does not say how buffer {name} of {type(model).__name__} is"
                " computed; the fsdp backend cannot train this model"
            )


@torch.no_grad()
def _load_weights(model: PreTrainedModel, model_dir: Path) -> None:
    """Copies this rank's rows of every parameter from the files of `model_dir`.

    Raises RunError as float_tensors and check_tied_head do, and where files and model have
    other tensors.
    """
    model_name = type(model).__name__
    params = dict(model.named_parameters())
    all_names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tensors = float_tensors(model_dir)
    missing = sorted(params.keys() - tensors.keys())
    if missing:
        raise RunError(f"{model_dir} has no {missing[0]} ({len(missing)} missing) for {model_name}")
    unexpected = sorted(tensors.keys() - all_names)
    if unexpected:
        raise RunError(
            f"{tensors[unexpected[0]].file} holds {unexpected[0]}, which {model_name} does not know"
            f" ({len(unexpected)} unknown tensors)"
        )
    if "lm_head.weight" in all_names - params.keys():
        check_tied_head(tensors)
    names_by_file: dict[Path, list[str]] = defaultdict(list)
    for name, param in params.items():
        header = tensors[name]
        if header.shape != tuple(param.shape):
            raise RunError(
                f"{header.file}: {name} has shape {list(header.shape)},"
                f" the model needs {list(param.shape)}"
            )
        names_by_file[header.file].append(name)
    for file, names in names_by_file.items():
        with safe_open(file, framework="pt") as opened:
            for name in names:
                param = params[name]
                rows = rows_of(param, param.device_mesh.get_local_rank())
                if rows.start < rows.stop:
                    param.to_local().copy_(opened.get_slice(name)[rows])
