"""Finds the files of prompts: a file, a directory of them, or a data set of the hub.

    gsm8k/train.jsonl                   a file
    saved/gsm8k:train                   a directory, and a split of it
    openai/gsm8k@COMMIT:main/train      a data set of the hub, a configuration and a split

A data set of the hub becomes the directory of its snapshot before a run starts, so that the
job reads local files only. Which files hold a split says the card of the data set, or else
their names, as `datasets` has it (huggingface.co/docs/hub/datasets-data-files-configuration).
"""

import re
from collections import Counter
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from nanoslime.config import RunConfig
from nanoslime.storage.hub import snapshot
from nanoslime.storage.prompt_rows import SUFFIXES
from nanoslime.types import RunError

_HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+?)(?:@([\w./-]+))?")
_SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})")
_NO_ROWS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
# Words in the names of files that hold no training prompts.
_HELD_OUT = ("test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation")


def with_local_prompts(config: RunConfig) -> RunConfig:
    """The configuration with absolute paths of all prompts, and a name for each source.

    Data sets of the hub are fetched, or found in its cache. Raises RunError for one that is
    in neither, and for a directory to evaluate on that stands for files to train on.
    """
    data = config.data
    sources = [
        replace(source, prompts=_local(source.prompts), name=source.title)
        for source in data.sources
    ]
    held_out = _local(data.eval_prompts)
    data = replace(data, prompts=_local(data.prompts), sources=sources, eval_prompts=held_out)
    sets = [replace(one, prompts=_local(one.prompts), name=one.title) for one in config.eval.sets]
    config = replace(config, data=data, eval=replace(config.eval, sets=sets))
    trained_on = {own.prompts for own in data.by_source().values()}
    for one in config.eval_sets:
        if one.prompts in trained_on and not Path(one.prompts).is_file():
            raise RunError(
                f"evaluation set {one.title}: {one.prompts} is what is trained on; name a split "
                "for it behind a colon, as in NAME:test"
            )
    return config


def prompt_files(path: Path) -> list[Path]:
    """The files that `path` stands for: itself, or those of DIRECTORY[:[CONFIGURATION/]SPLIT].

    Raises RunError where there are none, where it is not clear which, and where a part of
    a split is missing.
    """
    directory, config, split = _taken_apart(str(path))
    if not directory.is_dir():
        if path.is_file():
            return [path]
        raise RunError(
            f"prompt file {path} does not exist; set data.prompts or data.eval_prompts to one that "
            "does, or to a data set of the hub (OWNER/NAME)"
        )
    names = _data_names(directory)
    patterns = _patterns(directory, config, split)
    if patterns is not None:
        names = [name for name in names if any(_matches(name, p) for p in patterns)]
    else:
        names = _of_split([n for n in names if n.startswith(f"{config}/") or not config], split)
    if not names:
        raise RunError(
            f"{path}: no file of {', '.join(SUFFIXES)} in {directory} is of this split; there are "
            f"{', '.join(_data_names(directory)[:10]) or 'none'}"
        )
    _check_whole(directory, names)
    return [directory / name for name in names]


def _local(name: str) -> str:
    if not name:
        return ""
    path = Path(name).expanduser().absolute()
    directory, config, split = _taken_apart(str(path))
    place, _, _ = name.partition(":")
    hub_name = _HUB_NAME.fullmatch(place)
    if path.exists() or directory.is_dir() or hub_name is None or place.endswith(SUFFIXES):
        return str(path)
    repository, revision = hub_name.groups()
    card = snapshot(repository, revision or "", ["README.md"], "data.prompts", "dataset")
    patterns = _patterns(card, config, split)
    if patterns is None:
        patterns = [f"*{split}*{suffix}" for suffix in SUFFIXES]
    files = snapshot(repository, card.name, patterns, "data.prompts", "dataset")
    return f"{files}{name[len(place) :]}"


def _taken_apart(name: str) -> tuple[Path, str, str]:
    """Directory, configuration and split."""
    directory, colon, selected = name.rpartition(":")
    if Path(name).exists() or not colon:
        return Path(name), "", ""
    config, _, split = selected.rpartition("/")
    return Path(directory), config, split


def _data_names(directory: Path) -> list[str]:
    """The files with rows below a directory, without those that are hidden or of `datasets`
    itself."""
    names = []
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        is_hidden = any(part.startswith(".") for part in name.parts)
        has_rows = path.name not in _NO_ROWS and not path.name.startswith("cache-")
        if path.name.endswith(SUFFIXES) and has_rows and not is_hidden:
            names.append(str(name))
    return names


def _patterns(directory: Path, config: str, split: str) -> list[str] | None:
    """The files of a split by the card of the data set; None where the card names none.

    Raises RunError for a configuration or a split that the card has not.
    """
    listed = _card(directory).get("configs") or []
    by_name = {str(entry.get("config_name")): entry for entry in listed if isinstance(entry, dict)}
    if not by_name:
        return None
    if not config and split in by_name:
        # NAME:CONFIGURATION
        config, split = split, ""
    default = [name for name, entry in by_name.items() if entry.get("default")]
    if not config and (default or len(by_name) == 1):
        config = (default or list(by_name))[0]
    if config not in by_name:
        raise RunError(
            f"{directory} has no configuration {config!r}; name one behind a colon, as in "
            f"NAME:{next(iter(by_name))}/train; there are {', '.join(by_name)}"
        )
    files = by_name[config].get("data_files")
    if files is None:
        return [f"{by_name[config].get('data_dir', '.')}/**"]
    entries = files if isinstance(files, list) else [files]
    patterns: dict[str, list[str]] = {}
    for entry in entries:
        has_split = isinstance(entry, dict) and {"split", "path"} <= entry.keys()
        pair = entry if has_split else {"split": "train", "path": entry}
        paths = pair["path"] if isinstance(pair["path"], list) else [pair["path"]]
        patterns.setdefault(str(pair["split"]), []).extend(map(str, paths))
    split = split or ("train" if len(patterns) > 1 else next(iter(patterns)))
    if split not in patterns:
        raise RunError(
            f"{directory} has no split {split!r}; name one behind a colon, as in "
            f"NAME:{config}/{next(iter(patterns))}; there are {', '.join(patterns)}"
        )
    return patterns[split]


def _card(directory: Path) -> dict[str, Any]:
    """The YAML at the head of README.md; empty where there is none."""
    file = directory / "README.md"
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    parts = re.split(r"^---\s*$", text, maxsplit=2, flags=re.MULTILINE)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        card = yaml.safe_load(parts[1])
    except yaml.YAMLError as error:
        cause = " ".join(str(error).split())
        raise RunError(f"{file}: the head of the card is not YAML: {cause}") from error
    return card if isinstance(card, dict) else {}


def _matches(name: str, pattern: str) -> bool:
    pattern = pattern.removeprefix("./")
    return fnmatch(name, pattern) or fnmatch(name, pattern.replace("**/", ""))


def _of_split(names: list[str], split: str) -> list[str]:
    """The files that have the split's name in theirs. Without a name, those of training, or
    all that are not held out."""
    if split:
        return [name for name in names if split in _words(name)]
    of_train = [name for name in names if "train" in _words(name)]
    return of_train or [name for name in names if not _words(name) & set(_HELD_OUT)]


def _words(name: str) -> set[str]:
    """The words of a file's name: of `data/big_test-00000-of-00001.parquet`, with the others
    big_test, big and test."""
    words = re.split(r"[/.-]", name)
    return {*words, *re.split(r"[\W_]+", name)}


def _check_whole(directory: Path, names: list[str]) -> None:
    """Raises RunError where one of several files is missing, or the rows are there twice."""
    kinds = {suffix for suffix in SUFFIXES for name in names if name.endswith(suffix)}
    if len(kinds) > 1:
        raise RunError(
            f"{directory} has files of several kinds, {' and '.join(sorted(kinds))}, which may be "
            "the same rows; name one file, or a directory with one kind"
        )
    shards = Counter(shard.groups() for shard in map(_SHARD.match, names) if shard)
    for (stem, of), number in shards.items():
        if number < int(of):
            raise RunError(
                f"{directory} has {number} of the {int(of)} files {stem}-*; fetch it anew"
            )
