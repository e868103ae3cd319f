"""What a run may not change when it is resumed: its model, the format of its checkpoints, and
the order of its prompts.
"""

import filecmp
from pathlib import Path

import xxhash

from nanoslime.config import RunConfig
from nanoslime.types import RunError

# Of each file of weights so many blocks are compared, spread over it.
_NUM_BLOCKS = 16
_BLOCK_BYTES = 1 << 16


def check_resumed(run: Path, before: RunConfig, now: RunConfig, *, has_checkpoints: bool) -> None:
    """Raises RunError where `now` cannot go on with the run whose configuration is `before`.

    A prompt file of the same path is not looked into here: the data cursor in a
    checkpoint holds a hash of its prompts.
    """
    own = "the rehearsal's own model"
    old_model = before.model.hf_checkpoint or own
    new_model = now.model.hf_checkpoint or own
    if old_model != new_model and before.model.hf_checkpoint and not _is_model(Path(old_model)):
        raise RunError(
            f"{run} trains {old_model}, which is gone, so that {new_model} cannot be compared with "
            "it: put it back, or a link to it, and leave out --hf-checkpoint to resume"
        )
    if old_model != new_model and not _is_same_model(Path(old_model), Path(new_model)):
        raise RunError(
            f"{run} trains {old_model}, and {new_model} is another model: leave out "
            "--hf-checkpoint to resume it, or start a new run"
        )
    if not has_checkpoints:
        return
    order = (before.seed, before.data.shuffle)
    if order != (now.seed, now.data.shuffle):
        raise RunError(
            f"{run} goes through its prompts by seed={order[0]} and data.shuffle={order[1]}: leave "
            "both out to resume it, or start a new run"
        )
    formats = ["backend"]
    if now.training.backend == "megatron":
        formats.append("distributed_optimizer")
    for setting in formats:
        saved = getattr(before.training, setting)
        wanted = getattr(now.training, setting)
        if saved != wanted:
            raise RunError(
                f"{run} has checkpoints of training.{setting}={saved}, which training.{setting}="
                f"{wanted} cannot load: leave it out to resume, or start a new run from its hf/ "
                "export"
            )
    old_shares = _shares(before)
    new_shares = _shares(now)
    if old_shares != new_shares:
        raise RunError(
            f"{run} takes its prompts by data.sources with the weights {dict(old_shares)}, and "
            f"{dict(new_shares)} are others: leave data.sources out to resume it, or start a new "
            "run from its hf/ export"
        )
    old_files = [Path(own.prompts) for own in before.data.by_source().values()]
    new_files = [Path(own.prompts) for own in now.data.by_source().values()]
    for old_file, new_file in zip(old_files, new_files, strict=True):
        _check_same_prompts(run, old_file, new_file)


def _shares(config: RunConfig) -> list[tuple[str, float]]:
    return [(source.title, source.weight) for source in config.data.sources]


def _check_same_prompts(run: Path, old_file: Path, new_file: Path) -> None:
    can_compare = old_file != new_file and old_file.is_file() and new_file.is_file()
    if can_compare and not filecmp.cmp(old_file, new_file, shallow=False):
        raise RunError(
            f"{run} trains on the prompts of {old_file}, and those of {new_file} are others: "
            "leave out --prompts to resume it, or start a new run from its hf/ export"
        )


def _is_same_model(old: Path, new: Path) -> bool:
    """Whether two directories hold the same model; what is no directory holds none."""
    if not _is_model(old) or not _is_model(new):
        return False
    return old.samefile(new) or _digest(old) == _digest(new)


def _is_model(directory: Path) -> bool:
    return (directory / "config.json").is_file()


def _digest(directory: Path) -> str:
    """A hash of config.json and of blocks of each safetensors file, with their names."""
    hashed = xxhash.xxh3_128((directory / "config.json").read_bytes())
    for path in sorted(directory.rglob("*.safetensors")):
        size = path.stat().st_size
        hashed.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for block in range(_NUM_BLOCKS + 1):
                file.seek((size - min(size, _BLOCK_BYTES)) * block // _NUM_BLOCKS)
                hashed.update(file.read(_BLOCK_BYTES))
    return hashed.hexdigest()
