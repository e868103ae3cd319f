"""python -m jobs.hub REPOSITORY REVISION [--config-only]: a model of the hub as a local snapshot.

Runs on the login node, in a process of its own: importing the hub's library takes as long as planning a run.
Prints {"path", "revision"} as JSON; progress goes to stderr. Jobs run offline.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
_REST = ["*.json", "*.txt", "*.model", "*.jinja"]


def main(repository: str, revision: str, config_only: bool) -> int:
    patterns = ["config.json"] if config_only else _REST + _WEIGHTS
    try:
        path = Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as e:
        print(" ".join(str(e).split()), file=sys.stderr)
        return 1
    print(json.dumps({"path": str(path), "revision": path.name}))
    return 0


if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if a != "--config-only"]
    sys.exit(main(arguments[0], arguments[1], "--config-only" in sys.argv))
