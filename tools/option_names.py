"""python -m tools.option_names: write the option names of the installed Megatron and SGLang.

The login node checks options against these lists. The names are read from the sources of
the packages; nothing is imported.
"""

import ast
import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from nanoslime.config.upstream import list_file


@dataclass(frozen=True, slots=True)
class Package:
    """Options are the annotated names in the bodies of classes: by pattern of files, those
    of the named class, or of any class."""

    name: str
    class_names: dict[str, str | None]


SOURCES = {
    "megatron": Package(
        "megatron-core",
        {
            "megatron/core/model_parallel_config.py": "ModelParallelConfig",
            "megatron/core/transformer/transformer_config.py": "TransformerConfig",
        },
    ),
    "megatron_ddp": Package(
        "megatron-core",
        {"megatron/core/distributed/*_config.py": "DistributedDataParallelConfig"},
    ),
    "megatron_optimizer": Package(
        "megatron-core", {"megatron/core/optimizer/optimizer_config.py": "OptimizerConfig"}
    ),
    "sglang": Package("sglang", {"sglang/srt/arg_groups/fields/*.py": None}),
}


def installed(which: str) -> dict[str, Any]:
    """Package, version and sorted public option names of the package that is installed here."""
    source = SOURCES[which]
    distribution = metadata.distribution(source.name)
    root = Path(str(distribution.locate_file("")))
    options: set[str] = set()
    for file_pattern, class_name in source.class_names.items():
        for file in root.glob(file_pattern):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            options |= _annotated_names(tree, class_name)
    public = sorted(option for option in options if not option.startswith("_"))
    return {"package": source.name, "version": distribution.version, "names": public}


def _annotated_names(tree: ast.Module, class_name: str | None) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef) or class_name not in (None, node.name):
            continue
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                found.add(statement.target.id)
    return found


if __name__ == "__main__":
    for which in SOURCES:
        text = json.dumps(installed(which), indent=0) + "\n"
        list_file(which).write_text(text, encoding="utf-8")
