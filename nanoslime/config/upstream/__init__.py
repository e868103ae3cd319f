"""Names of the options that Megatron and SGLang take: a typo is found on the login node, importing neither.

The lists come from the sources of the installed packages; `python -m nanoslime.config.upstream` writes them.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from nanoslime.config.flags import suggest
from nanoslime.types import RunError

HERE = Path(__file__).parent
_SHAPE = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size")


@dataclass(frozen=True)
class Source:
    """Where a package declares its options: annotated names in these (file pattern, class); "": any class."""

    package: str
    classes: tuple[tuple[str, str], ...]
    ours: Mapping[str, str]  # names that nanoslime sets itself, and what to set instead


SOURCES = {
    "megatron": Source(
        "megatron-core",
        (
            ("megatron/core/model_parallel_config.py", "ModelParallelConfig"),
            ("megatron/core/transformer/transformer_config.py", "TransformerConfig"),
        ),
        {
            "tensor_model_parallel_size": "training.tp_size",
            "pipeline_model_parallel_size": "training.pp_size",
            "context_parallel_size": "training.cp_size",
            "expert_model_parallel_size": "training.ep_size",
            "sequence_parallel": "training.sequence_parallel",
            **dict.fromkeys(("params_dtype", "bf16", "fp16"), "model.dtype"),
            **dict.fromkeys(_SHAPE, "model.hf_checkpoint (its config.json)"),
        },
    ),
    "sglang": Source(
        "sglang",
        (("sglang/srt/arg_groups/fields/*.py", ""),),
        {
            **dict.fromkeys(("model_path", "tokenizer_path"), "model.hf_checkpoint"),
            "trust_remote_code": "model.trust_remote_code",
            "dtype": "model.dtype",
            "tp_size": "rollout.engine_tp_size",
            "device": "cluster.gpus_per_node",
            "host": "cluster.network_interface",
            "port": "nothing: it is chosen per job",
            "random_seed": "seed",
        },
    ),
}


def check(which: str, place: str, options: Mapping[str, Any]) -> None:
    """Raises RunError for an option that the package does not have, or that another field of ours sets."""
    source, names = SOURCES[which], known(which)
    for name in options:
        if name in source.ours:
            raise RunError(f"{place}.{name} is set by nanoslime; use {source.ours[name]}")
        if name not in names["names"]:
            near = suggest(name, {n: n for n in names["names"]})
            raise RunError(f"{place}.{name}: {source.package} {names['version']} has no such option{near}")


def known(which: str) -> dict[str, Any]:
    """The committed list: package, version, names."""
    return json.loads((HERE / f"{which}.json").read_text(encoding="utf-8"))


def installed(which: str) -> dict[str, Any]:
    """The same list, from the sources of the package installed here; nothing of it is imported."""
    source = SOURCES[which]
    package = metadata.distribution(source.package)
    root = Path(str(package.locate_file("")))
    names = {
        name
        for pattern, cls in source.classes
        for file in root.glob(pattern)
        for name in _annotated(ast.parse(file.read_text(encoding="utf-8")), cls)
    }
    public = sorted(name for name in names if not name.startswith("_"))
    return {"package": source.package, "version": package.version, "names": public}


def _annotated(tree: ast.Module, cls: str) -> list[str]:
    bodies = [n.body for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and cls in ("", n.name)]
    fields = [n for body in bodies for n in body if isinstance(n, ast.AnnAssign)]
    return [n.target.id for n in fields if isinstance(n.target, ast.Name)]
