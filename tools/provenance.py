"""From what a run was made: the command line, the code and all versions."""

import importlib.metadata
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanoslime.processes.command import ask
from nanoslime.run_dir import RunDir
from nanoslime.storage.shared_files import publish_json
from nanoslime.types import RunError

_VERSIONS = ("torch", "megatron-core", "sglang", "ray", "transformers", "submitit")
_MAX_DIFF_CHARS = 1_000_000
_GIT_DEADLINE_S = 60.0


def write_provenance(run: RunDir, argv: Sequence[str]) -> None:
    """Record the command line, the code's git commit and diff, and all versions."""
    publish_json(run.provenance, provenance(argv))


def provenance(argv: Sequence[str]) -> dict[str, Any]:
    """What explains a run later. The diff is cut at a million characters."""
    return {
        "argv": list(argv),
        "python": sys.version.split()[0],
        "versions": versions(),
        "git_commit": _git("rev-parse", "HEAD").strip(),
        "git_diff": _git("diff", "HEAD")[:_MAX_DIFF_CHARS],
        "host": socket.gethostname(),
        "time": time.time(),
    }


def versions() -> dict[str, str]:
    """Those of the packages on which a result depends."""
    return {name: _version(name) for name in _VERSIONS}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git(*arguments: str) -> str:
    """Output of git about this checkout; empty where git is missing or slow, or no checkout."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return ask(command, _GIT_DEADLINE_S).stdout
    except (OSError, RunError):
        return ""
