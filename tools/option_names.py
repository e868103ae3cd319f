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
class Declarations:
    """Options are the annotated names in the bodies of classes: of `class_name`, or of
    any class.
    """

    file_pattern: str
    class_name: str | None = None


@dataclass(frozen=True, slots=True)
class Package:
    name: str
    declarations: tuple[Declarations, ...]


SOURCES = {
    "megatron": Package(
        "megatron-core",
        (
            Declarations("megatron/core/model_parallel_config.py", "ModelParallelConfig"),
            Declarations("megatron/core/transformer/transformer_config.py", "TransformerConfig"),
        ),
    ),
    "megatron_ddp": Package(
        "megatron-core",
        (
            Declarations(
                "megatron/core/distributed/distributed_data_parallel_config.py",
                "DistributedDataParallelConfig",
            ),
        ),
    ),
    "megatron_optimizer": Package(
        "megatron-core",
        (Declarations("megatron/core/optimizer/optimizer_config.py", "OptimizerConfig"),),
    ),
    "sglang": Package("sglang", (Declarations("sglang/srt/arg_groups/fields/*.py"),)),
}


def installed(which: str) -> dict[str, Any]:
    """Package, version and sorted public option names of the package that is installed here."""
    source = SOURCES[which]
    distribution = metadata.distribution(source.name)
    root = Path(str(distribution.locate_file("")))
    options: set[str] = set()
    for declarations in source.declarations:
        for file in root.glob(declarations.file_pattern):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            options |= _annotated_names(tree, declarations.class_name)
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
