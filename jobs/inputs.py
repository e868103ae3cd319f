"""What a run reads, made sure of before submission: checkpoint, prompt files, environment of the nodes."""

import hashlib
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jobs.node import ROOT
from nanoslime.config import DataConfig, RunConfig
from nanoslime.models.shape import ModelShape
from nanoslime.models.tiny import tiny_qwen3_config
from nanoslime.plugins import resolve as resolve_name
from nanoslime.run_dir import RunDir, recorded_rollouts
from nanoslime.storage.safetensors_file import read_headers
from nanoslime.types import RunError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB = {
    "hub": "huggingface_hub:snapshot_download"
}  # imported on need only: as slow as planning a run
_HUB_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_ALIVE_S = 60  # heartbeats come every few seconds
_PROMPT_FILES = (".jsonl", ".parquet")


def resolve(config: RunConfig, *, download: bool) -> tuple[RunConfig, ModelShape]:
    """The configuration with every path absolute and found, and the model's shape.

    download: a hub id is fetched whole; otherwise only its config.json. Raises RunError for what is missing.
    """
    venv, run_root = config.cluster.venv, _absolute(config.cluster.run_root or "runs")
    cluster = replace(
        config.cluster, run_root=str(run_root), venv=str(_absolute(venv)) if venv else ""
    )
    config = replace(config, cluster=cluster)
    replays = config.rollout.load_rollouts
    if replays:
        recorded = recorded_rollouts(replays, config.rollout.num_rollout)
        config = replace(config, rollout=replace(config.rollout, load_rollouts=recorded))
    if config.rehearsal.enabled:
        return config, ModelShape.from_config(tiny_qwen3_config())
    config = _with_local_checkpoint(config, download)
    try:
        shape = ModelShape.read(config.model.hf_checkpoint)
    except ValueError as e:
        raise RunError(str(e)) from e
    if replays:
        return config, shape
    prompts, held_out = _prompt_file(config, "prompts"), _prompt_file(config, "eval_prompts")
    return replace(config, data=replace(config.data, prompts=prompts, eval_prompts=held_out)), shape


def _with_local_checkpoint(config: RunConfig, download: bool) -> RunConfig:
    name = config.model.hf_checkpoint
    if not name:
        way_out = "give --hf-checkpoint a directory or a hub id (Qwen/Qwen3-4B)"
        raise RunError(f"model.hf_checkpoint is not set: {way_out}")
    directory, revision = _absolute(name), config.model.revision
    from_hub = not directory.is_dir()
    if from_hub and not _HUB_ID.fullmatch(name):
        raise RunError(
            f"model.hf_checkpoint={name!r} is neither a directory nor a hub id (OWNER/NAME)"
        )
    if from_hub:
        directory = _snapshot(name, revision, _HUB_FILES if download else ("config.json",))
        revision = directory.name
    if download or not from_hub:
        read_headers(directory)
        has_tokenizer = any((directory / file).exists() for file in _TOKENIZER_FILES)
        if not has_tokenizer and not config.rollout.load_rollouts:
            raise RunError(f"{directory} holds no tokenizer: none of {', '.join(_TOKENIZER_FILES)}")
    return replace(
        config, model=replace(config.model, hf_checkpoint=str(directory), revision=revision)
    )


def _snapshot(name: str, revision: str, files: Sequence[str]) -> Path:
    """Local snapshot of a hub model, named after its commit. Jobs run offline; progress shows on stderr."""
    fetch = resolve_name("hub", _HUB, "model.hf_checkpoint")
    try:
        return Path(fetch(name, revision=revision or None, allow_patterns=list(files)))
    except Exception as e:  # OSErrors and ValueErrors of the hub, and whatever its transports raise
        problem = f"is no directory, and the hub did not give it ({' '.join(str(e).split())})"
        way_out = "give the directory of a checkpoint, or fetch it where there is a network"
        raise RunError(f"model.hf_checkpoint={name!r} {problem}; {way_out}") from e


def _absolute(path: str) -> Path:
    return Path(path).expanduser().absolute()


def _prompt_file(config: RunConfig, name: str) -> str:
    """Absolute path of a prompt file that is there and whose first line has the keys it should have."""
    value, data = getattr(config.data, name), config.data
    if not value:
        if name == "prompts":
            raise RunError("data.prompts is not set: give --prompts FILE (.jsonl or .parquet)")
        return ""
    path = _absolute(value)
    if not path.is_file():
        raise RunError(f"data.{name}={value!r}: no such file")
    if path.suffix not in _PROMPT_FILES:
        raise RunError(
            f"data.{name}={value!r}: choose a file that ends in {' or '.join(_PROMPT_FILES)}"
        )
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as file:
            _check_line(path, next(filter(str.strip, file), ""), data)
    return str(path)


def _check_line(path: Path, line: str, data: DataConfig) -> None:
    try:
        first = {**json.loads(line)}  # TypeError: JSON, but no object
    except (ValueError, TypeError) as e:
        raise RunError(f"{path} does not begin with a JSON object: {line.strip()[:80]!r}") from e
    for field, key in (("prompt_key", data.prompt_key), ("label_key", data.label_key)):
        if key and key not in first:
            way_out = f"set data.{field} to one of {', '.join(sorted(first))}"
            raise RunError(f"{path}: the first line has no {key!r}; {way_out}")


def refuse_if_running(run: RunDir) -> None:
    """Raises RunError where a node of the run's last attempt has lately given a sign of life."""
    attempt = run.latest_attempt()
    if attempt is None or attempt.ended() is not None:
        return
    for node, beat in attempt.heartbeats().items():
        age_s = time.time() - float(beat["time"])
        if "left" not in beat and age_s < _ALIVE_S:
            alive = f"node {node} of attempt {attempt.number} was alive {age_s:.0f} s ago"
            way_out = f"stop it first, or wait {_ALIVE_S} s if it was killed"
            raise RunError(f"{run.path} is running: {alive}; {way_out}")


def check_environment(config: RunConfig, repository: Path = ROOT) -> None:
    """Refuse GPU nodes whose environment was not made from the CUDA lock as it is now."""
    if config.cluster.device != "cuda":
        return
    venv = Path(config.cluster.venv or sys.prefix)
    stamp = venv / ".nanoslime-target"
    locks = [repository / "env" / name for name in ("cuda.lock", "cuda.pinned.txt")]
    content = b"".join(lock.read_bytes() for lock in locks if lock.is_file())
    wanted = {
        "target": "cuda",
        "lock_sha256": hashlib.sha256(content).hexdigest(),
    }  # as env/run.sh writes it
    lines = stamp.read_text().splitlines() if stamp.is_file() else []
    made = dict(line.split("=", 1) for line in lines if "=" in line)
    if wanted.items() <= made.items():
        return
    found = "was not made by env/run.sh" if venv.is_dir() else "does not exist"
    if made:
        older = " as it was before" if made.get("target") == "cuda" else ""
        found = f"was made from env/{made.get('target')}.lock{older}"
    place = "cluster.venv" if config.cluster.venv else "the environment that submits"
    raise RunError(
        f"cluster {config.cluster.name!r} has GPUs, but {place} ({venv}) {found}. Make it with\n"
        "    bash env/run.sh --target cuda true\n"
        f"on a machine that builds for the GPU nodes, and set cluster.venv to {repository}/.venv/cuda"
    )
