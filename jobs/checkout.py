"""This checkout, the environment of commands that shall run its code, and how they are typed.

The programs of jobs/ may be started by any Python from 3.8 on: they go on in the environment that
env/run.sh has made. So nothing here needs a package, or a later Python.
"""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
# No other package of ours is needed to plan, to submit and to look after runs.
_PACKAGES = ("pydantic", "submitit", "yaml")


def environment(**additions: str) -> "dict[str, str]":
    """Our environment with `additions`, and in PYTHONPATH this code first and the working directory
    last, so that a user's own modules are found there by `python -P`.
    """
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = dict.fromkeys([str(ROOT), *filter(None, inherited), os.getcwd()])
    return {**os.environ, **additions, "PYTHONPATH": os.pathsep.join(path)}


def module_command(python: str, module: str) -> "list[str]":
    """Runs a module of this code: without -P the working directory's would come first."""
    return [python, "-P", "-m", module]


def has_packages() -> bool:
    """Whether this Python can run our code."""
    is_new = sys.version_info >= (3, 12)
    return is_new and all(importlib.util.find_spec(package) for package in _PACKAGES)


def start(module: str) -> NoReturn:
    """Becomes `python -m MODULE` with the same arguments, in this checkout's environment or one
    that a stored cluster file names.

    Where there is none yet the process ends, and says how to make it.
    """
    python = sys.executable if has_packages() else next(_pythons(), "")
    if not python:
        words = ["bash", shown(ROOT / "env/run.sh"), "python", shown(sys.argv[0]), *sys.argv[1:]]
        sys.exit(
            f"{Path(sys.argv[0]).name}: this checkout has no environment yet; this makes it and "
            f"goes on (for GPU nodes with --target cuda behind run.sh): {shlex.join(words)}"
        )
    os.execve(python, [python, "-m", module, *sys.argv[1:]], environment())


def _pythons() -> "Iterator[str]":
    """The Pythons of environments that are ready, and that have our packages."""
    made = [ROOT / ".venv" / target for target in ("cpu", "cuda")]
    environments = [path for path in made if (path / ".nanoslime-target").exists()]
    for file in sorted(stored_clusters().glob("*.yaml")):
        text = file.read_text(errors="replace") if os.access(str(file), os.R_OK) else ""
        named = re.search(r"^venv: *([^#\n]+)", text, re.MULTILINE)
        if named:
            environments.append(file.parent / os.path.expanduser(named[1].strip(" \"'")))
    for path in environments:
        python = str(path / "bin/python")
        if os.access(python, os.X_OK) and _can_go_on(python):
            yield python


def _can_go_on(python: str) -> bool:
    """Whether this program would find all packages in that Python, and so not start it again."""
    try:
        done = subprocess.run([python, __file__], env=environment(), capture_output=True)
    except OSError:
        return False
    return done.returncode == 0


def stored_clusters(environ: "Mapping[str, str]" = os.environ) -> Path:
    """Where a user's cluster files lie, as jobs/init_site.py writes them: NAME.yaml."""
    home = environ.get("XDG_CONFIG_HOME", "")
    folder = Path(home) if home.startswith("/") else Path(environ.get("HOME", "/")) / ".config"
    return folder / "nanoslime" / "clusters"


def typed(script: str, *words: object) -> str:
    """The command that runs a program of this checkout, as it has to be typed here and now."""
    return shlex.join([shown(sys.executable), shown(ROOT / script), *map(str, words)])


def made_by(target: str) -> str:
    """The command that makes an environment."""
    return shlex.join(["bash", shown(ROOT / "env/run.sh"), "--target", target, "true"])


def shown(path: "str | Path") -> str:
    """A path as short as it can be typed in the current directory."""
    try:
        return str(Path(path).absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(Path(path).absolute())


if __name__ == "__main__":
    sys.exit(not has_packages())
