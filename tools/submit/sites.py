"""Which cluster this machine belongs to, and where its file lies.

A file is stored once by jobs/init_site.py, under the name that SLURM gives the cluster; so a
command needs no --cluster where it is submitted to the cluster on which it is typed.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from jobs.checkout import ROOT, stored_clusters
from jobs.cluster_env import slurm_says
from nanoslime.types import RunError

CLUSTERS = ROOT / "env" / "clusters"


def folders() -> tuple[Path, ...]:
    """Where a cluster is looked for by its name: the user's files come first."""
    return stored_clusters(), CLUSTERS


def of_this_machine(environ: Mapping[str, str]) -> Path | None:
    """The stored file of the cluster that this machine belongs to.

    SLURM is asked for the name only where a file is stored at all. Raises RunError where it does
    not tell it.
    """
    stored = sorted(path.stem for path in stored_clusters(environ).glob("*.yaml"))
    if not stored or shutil.which("scontrol", path=environ.get("PATH", "")) is None:
        return None
    name = cluster_name()
    if not name:
        raise RunError(
            "SLURM does not tell the name of this cluster (scontrol show config), so that its file "
            f"is not known: name one of {', '.join(stored)} by --cluster, or add --local"
        )
    file = stored_clusters(environ) / f"{name}.yaml"
    return file if file.is_file() else None


def cluster_name() -> str:
    """SLURM's ClusterName; empty where it does not answer."""
    match = re.search(r"^ClusterName\s*=\s*(\S+)", slurm_says("scontrol", "show", "config"), re.M)
    return match[1] if match else ""
