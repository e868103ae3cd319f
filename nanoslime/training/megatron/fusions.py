"""Which of megatron-core's fused paths are switched on.

They save kernels and memory, and each needs something of the machine:

    apply_rope_fusion             Transformer Engine; not latent attention, where megatron-core
                                  0.19.2 has a kernel for YaRN only
    bias_activation_fusion        torch.compile for the GPU: Triton, a C compiler, Python's headers
    moe_permute_fusion            Transformer Engine
    gradient_accumulation_fusion  Apex's kernel, also beside Transformer Engine, because
                                  megatron-core's own output layer asks for it

`masked_softmax_fusion` belongs to an attention that serves no packs, and
`bias_dropout_fusion` to dropout: here both would do nothing. `training.megatron` can
switch each by its name.
"""

import shutil
import sysconfig
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from nanoslime.models.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Kernels:
    """What is there for fused paths on this machine; by default nothing, as on a CPU."""

    transformer_engine: bool = False
    compiler: bool = False
    gradient_accumulation: bool = False


def fused_paths(shape: ModelShape, kernels: Kernels) -> dict[str, bool]:
    """megatron-core's switches of fused paths, on where this model and machine have them."""
    return {
        "apply_rope_fusion": kernels.transformer_engine and shape.mla is None,
        "bias_activation_fusion": kernels.compiler,
        "moe_permute_fusion": kernels.transformer_engine and shape.moe is not None,
        "gradient_accumulation_fusion": kernels.gradient_accumulation,
    }


def kernels_for(device: torch.device) -> Kernels:
    """What megatron-core and torch find installed for `device`."""
    if device.type != "cuda":
        return Kernels()
    return Kernels(
        transformer_engine=find_spec("transformer_engine") is not None,
        compiler=_can_compile(),
        gradient_accumulation=find_spec("fused_weight_gradient_mlp_cuda") is not None,
    )


def _can_compile() -> bool:
    """Whether torch.compile works for the GPU: Triton compiles its launchers in C."""
    headers = Path(sysconfig.get_path("include"))
    if find_spec("triton") is None or not (headers / "Python.h").is_file():
        return False
    return any(shutil.which(name) for name in ("cc", "gcc", "clang"))
