"""Stands in for torchvision on machines without CUDA; on the engine's PYTHONPATH only there.

PyPI's torchvision is a CUDA build and cannot be loaded beside the CPU torch ("operator torchvision::nms does
not exist"), yet SGLang 0.5.23 imports it for its vision models. Text models import names from it and call
none, so every submodule and every name is a placeholder here.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence

__version__ = "0.0.0"


class _Placeholder(type):
    """A class that has every attribute (itself) and whose calls return it: good as a base or a decorator."""

    def __getattr__(cls, name: str) -> _Placeholder:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __call__(cls, *args: object, **kwargs: object) -> _Placeholder:
        return cls


def __getattr__(name: str) -> _Placeholder:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Placeholder(name, (), {})


class _Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        is_ours = name.startswith(f"{__name__}.")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_ours else None

    def exec_module(self, module: types.ModuleType) -> None:
        module.__getattr__ = __getattr__  # type: ignore[method-assign]


sys.meta_path.append(_Submodules())
