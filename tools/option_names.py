"""python -m tools.option_names: write the option names of the installed Megatron and SGLang.

The login node checks against them. They are read from the sources of the packages; nothing is imported.
"""

import ast
import json
from importlib import metadata
from pathlib import Path
from typing import Any

from nanoslime.config.upstream import list_file

SOURCES = {  # package, and where it declares options: annotated names of (file pattern, class); "": any class
    "megatron": (
        "megatron-core",
        (
            ("megatron/core/model_parallel_config.py", "ModelParallelConfig"),
            ("megatron/core/transformer/transformer_config.py", "TransformerConfig"),
        ),
    ),
    "sglang": ("sglang", (("sglang/srt/arg_groups/fields/*.py", ""),)),
}


def installed(which: str) -> dict[str, Any]:
    """Package, version and sorted public option names of what is installed here."""
    name, classes = SOURCES[which]
    package = metadata.distribution(name)
    root = Path(str(package.locate_file("")))
    options = {
        option
        for pattern, cls in classes
        for file in root.glob(pattern)
        for option in _annotated(ast.parse(file.read_text(encoding="utf-8")), cls)
    }
    public = sorted(option for option in options if not option.startswith("_"))
    return {"package": name, "version": package.version, "names": public}


def _annotated(tree: ast.Module, cls: str) -> list[str]:
    bodies = [n.body for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and cls in ("", n.name)]
    fields = [n for body in bodies for n in body if isinstance(n, ast.AnnAssign)]
    return [n.target.id for n in fields if isinstance(n.target, ast.Name)]


if __name__ == "__main__":
    for which in SOURCES:
        list_file(which).write_text(json.dumps(installed(which), indent=0) + "\n", encoding="utf-8")
