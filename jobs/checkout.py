"""This checkout, and the environment of commands that shall run its code."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def environment(**additions: str) -> dict[str, str]:
    """Our environment with `additions`, and this checkout first in PYTHONPATH."""
    path = str(ROOT)
    inherited = os.environ.get("PYTHONPATH")
    if inherited:
        path = f"{path}{os.pathsep}{inherited}"
    return {**os.environ, **additions, "PYTHONPATH": path}
