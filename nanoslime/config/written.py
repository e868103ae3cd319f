"""What stands in a YAML file or behind a flag, read as the field that it is for needs it.

YAML 1.1 takes `off` for a truth value, 012 for 10 and 4:00:00 for 14400. Here the field decides:
a text field gets the text that was written. A path is relative to the file that names it, and `~`
and `$NAME` in it stand for what they are where the run is submitted.
"""

import os
import re
from collections.abc import Collection
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from nanoslime.config.base import SECRET_NAME, Expanded, FilePath
from nanoslime.types import RunError

_VARIABLE = re.compile(r"\$\{(\w+)\}|\$(\w+)|\$")
# OWNER/NAME of a hub, with a revision or a split behind it.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[^:]*)?(:.*)?")
_SUFFIXES = (".json", ".jsonl", ".parquet", ".arrow", ".gz", ".zst")
# YAML 1.1 has none without a dot.
_FLOAT = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+")


@dataclass(frozen=True, slots=True, repr=False)
class Written:
    """A scalar without quotes that is more than a text to YAML, and how it was written."""

    value: Any
    text: str

    def __repr__(self) -> str:
        return self.text


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping; YAML would silently take the last."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.aliased: list[yaml.Node | None] = []
        """The nodes that an alias stands for."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        is_alias = self.check_event(yaml.AliasEvent)
        node: yaml.Node | None = super().compose_node(parent, index)
        if is_alias:
            self.aliased.append(node)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = []
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        for key_node, _ in pairs:
            key = key_node.value
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"key {key!r} stands twice", problem_mark=node.start_mark
                )
            seen.append(key)
        found = super().construct_mapping(node, deep)
        return {key.text if isinstance(key, Written) else key: found[key] for key in found}

    def construct_scalar_with_text(self, node: yaml.ScalarNode) -> Written:
        """The value of a scalar; what is no decimal number, such as 4:00:00, is a text."""
        value: Any = self.construct_scalar(node)
        kind = node.tag.rpartition(":")[2]
        try:
            if kind in ("bool", "null"):
                value = yaml.SafeLoader.yaml_constructors[node.tag](self, node)
            elif kind == "int":
                value = int(value)
            elif kind == "float" and ":" not in value:
                value = self.construct_yaml_float(node)
        except (ValueError, LookupError):
            # It is tagged as what it is not, or has more digits than Python reads.
            value = node.value
        return Written(value, node.value)


for _kind in ("null", "bool", "int", "float", "timestamp"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_scalar_with_text)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def read_yaml(path: Path, keys: Collection[str]) -> Any:
    """The content of a file, with `Written` for each scalar that YAML takes for no text.

    A mapping at its top under none of `keys` that an alias refers to only serves that alias.
    Raises RunError for what cannot be read.
    """
    try:
        loader = _Loader(path.read_text(encoding="utf-8-sig"))
        node = loader.get_single_node()
        if isinstance(node, yaml.MappingNode):
            node.value = [
                (key, value)
                for key, value in node.value
                if key.value in (*keys, "<<")
                or not isinstance(value, yaml.MappingNode)
                or value not in loader.aliased
            ]
        return loader.construct_document(node) if node else {}
    except RecursionError:
        raise RunError(f"{path}: lists or mappings in it are nested too deeply") from None
    except (OSError, UnicodeDecodeError) as e:
        raise RunError(f"cannot read {path}: {e}") from e
    except yaml.YAMLError as e:
        one_line = " ".join(str(e).split())
        raise RunError(f"{path} is not YAML: {one_line}") from e


def as_field(kind: Any, content: Any, folder: Path | None) -> Any:
    """What a field of this type takes for `content`, which may hold lists and mappings.

    folder: that of the file which names a path; None for a flag. Raises ValueError for a path
    that leads nowhere.
    """
    kinds, marks = _unfolded(kind)
    inner = {get_origin(one): get_args(one)[-1] for one in kinds if get_args(one)}
    section = next((one for one in kinds if isinstance(one, type) and is_dataclass(one)), None)
    if isinstance(content, Written | bool):
        content = _scalar(kinds, content)
    if section is not None and isinstance(content, str):
        content = section.from_text(content)  # type: ignore[attr-defined]
    if isinstance(content, list):
        return [as_field(inner.get(list, Any), one, folder) for one in content]
    if isinstance(content, dict):
        hints = get_type_hints(section, include_extras=True) if section else {}
        of_others = inner.get(dict, Any)
        return {k: as_field(hints.get(k, of_others), v, folder) for k, v in content.items()}
    for mark in marks:
        if isinstance(mark, FilePath) and isinstance(content, str) and content:
            return _located(content, mark, folder)
        if isinstance(mark, Expanded) and isinstance(content, str):
            return _expanded(
                content, "write one that is meant for the job's shell in cluster.setup"
            )
    return content


def _unfolded(kind: Any) -> tuple[list[Any], list[Any]]:
    """The types of a union, and what is noted at them (`Annotated`)."""
    origin = get_origin(kind)
    if origin is Annotated:
        kinds, marks = _unfolded(get_args(kind)[0])
        return kinds, marks + list(get_args(kind)[1:])
    if origin not in (Union, UnionType):
        return [kind], []
    found = [_unfolded(one) for one in get_args(kind)]
    return sum((kinds for kinds, _ in found), []), sum((marks for _, marks in found), [])


def _scalar(kinds: list[Any], scalar: Written | bool) -> Any:
    """The value, or for a field of texts the text."""
    if isinstance(scalar, bool):
        # In JSON behind a flag.
        scalar = Written(scalar, str(scalar).lower())
    value, text = scalar.value, scalar.text
    choices = {choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)}
    if text in choices:
        return text
    if isinstance(value, bool) and {"on", "off"} <= choices:
        return "on" if value else "off"
    if value is None and type(None) not in kinds:
        empty = {str: "", list: [], dict: {}}
        return next((empty[kind] for kind in map(_plain, kinds) if kind in empty), None)
    if Any in kinds or value is None or (isinstance(value, bool) and bool in kinds):
        return value
    return text if str in kinds or isinstance(value, bool) else value


def _plain(kind: Any) -> Any:
    return get_origin(kind) or kind


def _located(text: str, mark: FilePath, folder: Path | None) -> str:
    """The path with `~` and variables put in, from `folder` on where it is relative."""
    if "://" in text or (Path(text).is_absolute() and Path(text).exists()):
        return text
    path = _expanded(text, "write the path")
    if "\0" in path:
        raise ValueError(f"{text!r} has a character that no path can have")
    if folder is None:
        return path
    before_split = path.partition(":")[0]
    is_name = _HUB_NAME.fullmatch(path) and not before_split.endswith(_SUFFIXES)
    if mark.may_be_name and is_name and not (folder / before_split).exists():
        return path
    return str(folder / path)


def _expanded(text: str, otherwise: str) -> str:
    """The text with variables put in, and `~` as a shell does where a variable is set.

    otherwise: what else to do about a variable that cannot be put in.
    """
    for found in _VARIABLE.finditer(text):
        _require_variable(text, found[1] or found[2], otherwise)
    parts = [os.path.expanduser(part) for part in os.path.expandvars(text).split(":")]
    for part in parts:
        if part.startswith("~"):
            raise ValueError(f"{text!r}: there is no home directory of {part.partition('/')[0]}")
    return ":".join(parts)


def _require_variable(text: str, name: str | None, otherwise: str) -> None:
    if name is None:
        raise ValueError(
            f"{text!r}: a $ here begins a variable, $NAME or ${{NAME}}, and one of these names "
            f"none; {otherwise}"
        )
    if re.fullmatch(SECRET_NAME, name, re.IGNORECASE):
        raise ValueError(
            f"{text!r} would write {name} into the run's files; export {name} in the shell that "
            "submits, which the job inherits"
        )
    if not os.environ.get(name):
        raise ValueError(
            f"{text!r}: the variable {name} is not set here; export it, or {otherwise}"
        )
