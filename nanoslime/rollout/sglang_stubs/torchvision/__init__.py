"""Stands in for torchvision in the engine's processes on a machine without CUDA.

PyPI's torchvision is a CUDA build and cannot be loaded beside the CPU torch ("operator
torchvision::nms does not exist"), yet SGLang 0.5.23 imports it for its vision models.
Text models import names from it and call none, so every submodule and every name is a
placeholder here.
"""

from __future__ import annotations

import sys
import types
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

__version__ = "0.0.0"


class _Placeholder(type):
    """The type of a class that has every attribute and can be called; both give the
    class itself.

    The class serves as a base class and as a decorator.
    """

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


class _Submodules(MetaPathFinder, Loader):
    """Finds every submodule of torchvision; it holds nothing but placeholders."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if not name.startswith(f"{__name__}."):
            return None
        return ModuleSpec(name, self, is_package=True)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__getattr__ = __getattr__  # type: ignore[method-assign]


sys.meta_path.append(_Submodules())
