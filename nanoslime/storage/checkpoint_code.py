"""The files of a tokenizer and the code that a checkpoint brings, checked before a run.

transformers reads them on the cluster. Where a file is missing it makes an empty tokenizer, or one
that splits text otherwise than the checkpoint's own code, and says nothing.
"""

from pathlib import Path
from typing import Any

from nanoslime.storage.json_file import read_object
from nanoslime.types import RunError

_TOKENIZER = "tokenizer.json"
_TIKTOKEN = "tiktoken.model"
_CONFIG = "tokenizer_config.json"


def check_tokenizer(directory: Path, *, trust_remote_code: bool) -> None:
    """Raises RunError for a tokenizer that is missing or can only be read by code that is
    not trusted."""
    code = _auto_map(directory / _CONFIG).get("AutoTokenizer")
    if not (directory / _TOKENIZER).exists():
        if code and not trust_remote_code:
            raise RunError(
                f"{directory} has no {_TOKENIZER}: its tokenizer is code of the checkpoint "
                f"({_CONFIG}: {_names(code)[0]}); read it, and allow it by --trust-remote-code"
            )
        if not code:
            _require_vocabulary(directory)


def check_code(directory: Path) -> None:
    """Raises RunError where config.json or tokenizer_config.json names code that is not in
    `directory`."""
    for config in ("config.json", _CONFIG):
        for value in _auto_map(directory / config).values():
            for name in _names(value):
                repository, is_elsewhere, _ = name.rpartition("--")
                if is_elsewhere:
                    raise RunError(
                        f"{directory / config} names code of another repository, {repository}, "
                        "which a job cannot fetch; put it beside the checkpoint and name it there"
                    )
                module, _, _ = name.rpartition(".")
                file = directory / f"{module.replace('.', '/')}.py"
                if not file.exists():
                    raise RunError(f"{file} is missing; {config} names {name} as its code")


def _require_vocabulary(directory: Path) -> None:
    if (directory / "tokenizer.model").exists() or (directory / "vocab.json").exists():
        return
    if (directory / _TIKTOKEN).exists():
        raise RunError(
            f"{directory} holds {_TIKTOKEN}, which does not say how text is split before its "
            f"tokens are looked up, and {_CONFIG} names no code that does; add {_TOKENIZER}"
        )
    raise RunError(
        f"{directory} holds no tokenizer: none of {_TOKENIZER}, tokenizer.model, vocab.json"
    )


def _auto_map(config: Path) -> dict[str, Any]:
    """Which code stands for which class of transformers."""
    auto_map = read_object(config).get("auto_map") or {}
    # Old files have the tokenizer's pair alone.
    return auto_map if isinstance(auto_map, dict) else {"AutoTokenizer": auto_map}


def _names(value: Any) -> list[str]:
    """The classes, "module.Class", of an entry: one, or the slow and the fast tokenizer."""
    return [value] if isinstance(value, str) else [name for name in value if name]
