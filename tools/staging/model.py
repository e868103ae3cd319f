"""A run's model on a node's own disk.

    python -m tools.staging.model SOURCE STORAGE SHARED RESULT LOCK
        SHARED is the run's directory, and LOCK the number of the open lock file, which the agent
        that starts this keeps open

Of the agents and jobs on a node one reads the shared files; what it has read is hashed, and has to
be what the other nodes of the run have read. A later run reads the copy instead, hashes it again,
and copies anew what has become another.
"""

import sys
from pathlib import Path

from jobs.staging import Copy, model_files
from nanoslime.storage.safetensors_file import read_headers
from nanoslime.storage.shared_files import as_json, publish_once, read_json
from tools.staging import copies


def main(argv: list[str]) -> int:
    source, storage, shared, result, lock = argv
    copy = Copy.of(Path(source), Path(storage))

    def fill(folder: Path) -> dict[str, str]:
        hashes = {}
        for file in model_files(copy.source):
            with (folder / file.name).open("wb") as target:
                hashes[file.name] = copies.hashed(file, target)
        read_headers(folder)
        return hashes

    def differing(found: dict[str, str]) -> str:
        """A file that is not what the first node of the run to read it has had."""
        manifest = Path(shared) / f"manifest-{copy.key}.json"
        publish_once(manifest, as_json(found))
        first = read_json(manifest)
        return next((name for name in first if found.get(name) != first[name]), "")

    return copies.run(copy, fill, differing, Path(result), int(lock))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
