"""The fields of a configuration one by one: name, value, default, and what is said of it."""

import ast
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any

from nanoslime.config.algorithm import GRPOConfig


@dataclass(frozen=True, slots=True)
class FieldValue:
    """One field of a configuration, with its dotted name."""

    name: str
    value: Any
    default: Any
    section: type
    """The class that has the field."""

    @property
    def sentences(self) -> str:
        """The field's docstring, on one line; that of the nearest class which has one."""
        leaf = self.name.rpartition(".")[2]
        found = [docstrings(one).get(leaf, "") for one in self.section.__mro__]
        return next(filter(None, found), "")


def values(section: Any, prefix: str = "") -> Iterator[FieldValue]:
    """The fields of `section` and of the sections in it; a list of sections is one field."""
    for field in fields(section):
        name = prefix + field.name
        value = getattr(section, field.name)
        if is_dataclass(value):
            yield from values(value, f"{name}.")
            continue
        info = type(section).__pydantic_fields__[field.name]
        default = info.get_default(call_default_factory=True)
        if name == "algorithm.name":
            default = GRPOConfig.name
        yield FieldValue(name, value, default, type(section))


@cache
def docstrings(section: type) -> dict[str, str]:
    """The texts below the fields that `section` itself declares, by the fields' names."""
    module = sys.modules.get(section.__module__)
    if module is None or section is object:
        return {}
    found = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if not (isinstance(node, ast.ClassDef) and node.name == section.__name__):
            continue
        for field, below in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                text = ast.literal_eval(below.value)
                found[ast.unparse(field.target)] = " ".join(text.split())
    return found
