"""Names of the options that Megatron and SGLang take: a typo is found on the login node, importing neither.

The lists come from the sources of the installed packages; `python -m tools.option_names` writes them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanoslime.config.flags import suggest
from nanoslime.types import RunError

_SHAPE = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size")
OURS = {  # names that nanoslime sets itself, and what to set instead
    "megatron": {
        "tensor_model_parallel_size": "training.tp_size",
        "pipeline_model_parallel_size": "training.pp_size",
        "context_parallel_size": "training.cp_size",
        "expert_model_parallel_size": "training.ep_size",
        "expert_tensor_parallel_size": "training.etp_size",
        "virtual_pipeline_model_parallel_size": "training.vpp_size",
        "sequence_parallel": "training.sequence_parallel",
        **dict.fromkeys(("params_dtype", "bf16", "fp16"), "model.dtype"),
        **dict.fromkeys(_SHAPE, "model.hf_checkpoint (its config.json)"),
    },
    "sglang": {
        **dict.fromkeys(("model_path", "tokenizer_path"), "model.hf_checkpoint"),
        "trust_remote_code": "model.trust_remote_code",
        "dtype": "model.dtype",
        "tp_size": "rollout.engine_tp_size",
        "device": "cluster.gpus_per_node",
        "host": "cluster.network_interface",
        "port": "nothing: it is chosen per job",
        "random_seed": "seed",
    },
}


def check(which: str, place: str, options: Mapping[str, Any]) -> None:
    """Raises RunError for an option that the package does not have, or that another field of ours sets."""
    listed = known(which)
    for name in options:
        if name in OURS[which]:
            raise RunError(f"{place}.{name} is set by nanoslime; use {OURS[which][name]}")
        if name not in listed["names"]:
            near = suggest(name, {n: n for n in listed["names"]})
            package = f"{listed['package']} {listed['version']}"
            raise RunError(f"{place}.{name}: {package} has no such option{near}")


def list_file(which: str) -> Path:
    return Path(__file__).with_name(f"{which}.json")


def known(which: str) -> dict[str, Any]:
    """The committed list: package, version, names."""
    return json.loads(list_file(which).read_text(encoding="utf-8"))
