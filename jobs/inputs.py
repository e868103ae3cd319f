"""What a run reads, made sure of before submission: checkpoint, prompt files, environment of the nodes."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from nanoslime.config import RunConfig
from nanoslime.models.shape import ModelShape
from nanoslime.models.tiny import tiny_qwen3_config
from nanoslime.run_dir import RunDir
from nanoslime.storage.safetensors_file import read_headers
from nanoslime.types import RunError

REPOSITORY = Path(__file__).resolve().parents[1]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_DEADLINE_S = 4 * 3600
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_ALIVE_S = 60  # heartbeats come every few seconds
_PROMPT_FILES = (".jsonl", ".parquet")


def resolve(config: RunConfig, *, download: bool) -> tuple[RunConfig, ModelShape]:
    """The configuration with every path absolute and found, and the model's shape.

    download: a hub id is fetched whole; otherwise only its config.json. Raises RunError for what is missing.
    """
    cluster = replace(
        config.cluster, run_root=str(Path(config.cluster.run_root or "runs").expanduser().absolute())
    )
    if cluster.venv:
        cluster = replace(cluster, venv=str(Path(cluster.venv).expanduser().absolute()))
    config = replace(config, cluster=cluster)
    if config.rehearsal.enabled:
        return config, ModelShape.from_config(tiny_qwen3_config())
    config = _with_local_checkpoint(config, download)
    shape = _shape(Path(config.model.hf_checkpoint))
    prompts, held_out = _prompt_file(config, "prompts"), _prompt_file(config, "eval_prompts")
    return replace(config, data=replace(config.data, prompts=prompts, eval_prompts=held_out)), shape


def _with_local_checkpoint(config: RunConfig, download: bool) -> RunConfig:
    name = config.model.hf_checkpoint
    if not name:
        raise RunError(
            "model.hf_checkpoint is not set: give --hf-checkpoint a directory or a hub id (Qwen/Qwen3-4B)"
        )
    directory, revision = Path(name).expanduser().absolute(), config.model.revision
    if directory.is_dir():
        whole = True
    elif _HUB_ID.fullmatch(name):
        directory, revision = _from_hub(name, revision, config_only=not download)
        whole = download
    else:
        raise RunError(f"model.hf_checkpoint={name!r} is neither a directory nor a hub id (OWNER/NAME)")
    if whole:
        read_headers(directory)
        if not any((directory / file).exists() for file in _TOKENIZER_FILES):
            raise RunError(f"{directory} holds no tokenizer: none of {', '.join(_TOKENIZER_FILES)}")
    return replace(config, model=replace(config.model, hf_checkpoint=str(directory), revision=revision))


def _from_hub(name: str, revision: str, *, config_only: bool) -> tuple[Path, str]:
    """Local snapshot of a hub model and its commit; progress shows on stderr."""
    command = [sys.executable, "-m", "jobs.hub", name, revision, *(["--config-only"] if config_only else [])]
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=None, text=True, timeout=_HUB_DEADLINE_S
        )
    except subprocess.TimeoutExpired as e:
        raise RunError(f"fetching {name} from the hub took over {_HUB_DEADLINE_S} s") from e
    if done.returncode:
        raise RunError(
            f"model.hf_checkpoint={name!r} is no directory, and the hub did not give it (see above); "
            "give the directory of a checkpoint, or fetch it where there is a network"
        )
    found = json.loads(done.stdout)
    return Path(found["path"]), str(found["revision"])


def _shape(directory: Path) -> ModelShape:
    try:
        return ModelShape.read(directory)
    except ValueError as e:
        raise RunError(str(e)) from e


def _prompt_file(config: RunConfig, name: str) -> str:
    """Absolute path of a prompt file that is there and whose first line has the keys it should have."""
    value, data = getattr(config.data, name), config.data
    if not value:
        if name == "prompts":
            raise RunError("data.prompts is not set: give --prompts FILE (.jsonl or .parquet)")
        return ""
    path = Path(value).expanduser().absolute()
    if not path.is_file():
        raise RunError(f"data.{name}={value!r}: no such file")
    if path.suffix not in _PROMPT_FILES:
        raise RunError(f"data.{name}={value!r}: choose a file that ends in {' or '.join(_PROMPT_FILES)}")
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as file:
            _check_line(path, next(filter(str.strip, file), ""), (data.prompt_key, data.label_key))
    return str(path)


def _check_line(path: Path, line: str, keys: tuple[str, str]) -> None:
    try:
        first = json.loads(line)
    except ValueError as e:
        raise RunError(f"{path} does not begin with a JSON object: {line.strip()[:80]!r}") from e
    if not isinstance(first, dict):
        raise RunError(f"{path} does not begin with a JSON object: {line.strip()[:80]!r}")
    for field, key in zip(("prompt_key", "label_key"), keys, strict=True):
        if key and key not in first:
            raise RunError(
                f"{path}: the first line has no {key!r}; "
                f"set data.{field} to one of {', '.join(sorted(first))}"
            )


def refuse_if_running(run: RunDir) -> None:
    """Raises RunError where a node of the run's last attempt has lately given a sign of life."""
    attempt = run.latest_attempt()
    if attempt is None or attempt.ended() is not None:
        return
    for node, beat in attempt.heartbeats().items():
        age_s = time.time() - float(beat["time"])
        if "left" not in beat and age_s < _ALIVE_S:
            raise RunError(
                f"{run.path} is running: node {node} of attempt {attempt.number} was alive {age_s:.0f} s "
                f"ago; stop it first, or wait {_ALIVE_S} s if it was killed"
            )


def check_environment(config: RunConfig, repository: Path = REPOSITORY) -> None:
    """Refuse GPU nodes whose environment was not made from the CUDA lock as it is now."""
    if config.cluster.device != "cuda":
        return
    venv = Path(config.cluster.venv or sys.prefix)
    stamp, wanted = venv / ".nanoslime-target", _cuda_stamp(repository)
    made = (
        dict(line.split("=", 1) for line in stamp.read_text().splitlines() if "=" in line)
        if stamp.is_file()
        else {}
    )
    if all(made.get(key) == value for key, value in wanted.items()):
        return
    if not made:
        found = "was not made by env/run.sh" if venv.is_dir() else "does not exist"
    else:
        found = f"was made from env/{made.get('target')}.lock" + (
            " as it was before" if made.get("target") == "cuda" else ""
        )
    place = "cluster.venv" if config.cluster.venv else "the environment that submits"
    raise RunError(
        f"cluster {config.cluster.name!r} has GPUs, but {place} ({venv}) {found}. Make it with\n"
        "    bash env/run.sh --target cuda true\n"
        f"on a machine that builds for the GPU nodes, and set cluster.venv to {repository}/.venv/cuda"
    )


def _cuda_stamp(repository: Path) -> dict[str, str]:
    """What env/run.sh writes beside an environment that it makes from the CUDA lock."""
    files = [repository / "env/cuda.lock", repository / "env/cuda.pinned.txt"]
    content = b"".join(file.read_bytes() for file in files if file.is_file())
    return {"target": "cuda", "lock_sha256": hashlib.sha256(content).hexdigest()}
