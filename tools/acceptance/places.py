"""What a rung's driver leaves in its run directory."""

from pathlib import Path

from nanoslime.run_dir import RunDir

# When and after which step the driver was killed.
KILLED = "killed.json"
# By attempt: memory-<n>.json.
MEMORY = "memory"


def folder(run: RunDir) -> Path:
    return run.path / "acceptance"
