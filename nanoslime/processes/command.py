"""A command that is run for its output, with a deadline."""

import shlex
import subprocess
from collections.abc import Mapping, Sequence

from nanoslime.types import RunError


def ask(
    command: Sequence[str],
    deadline_s: float,
    *,
    who: str = "",
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command and return its exit code and its output as text.

    who: what the error calls the command, by default the command itself. env: the
    environment, by default ours. stdin: text that the command reads. Raises RunError if
    it does not answer in time, OSError if it cannot be run.
    """
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=deadline_s,
            env=None if env is None else dict(env),
            input=stdin,
        )
    except subprocess.TimeoutExpired as error:
        name = who or shlex.join(command)
        raise RunError(f"{name} did not answer within {deadline_s:g} s") from error
