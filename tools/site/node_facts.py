"""What a node says of itself: interfaces, HCAs, disks and GPUs, by a shell script of no needs.

It is run by a small srun on a node of the partition, or, where that does not start, on this
machine, whose answers may differ from a node's.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from jobs.submission import complaint
from nanoslime.processes.command import ask
from nanoslime.types import RunError

_PATIENCE_S = 30
_DEADLINE_S = 90.0
# Where sites have a node's own disk. What a job's environment names is another one in each job.
_SCRATCH = "/local_scratch /localscratch /scratch/local /local /lscratch /scratch /tmp"
# $1 is put before /sys and /proc, for tests. df needs no option beyond GNU's.
SCRIPT = f"""
echo "host $(uname -n)"
for i in "$1"/sys/class/net/*; do
    [ -d "$i" ] || continue
    n=${{i##*/}}
    address=$(PATH="$PATH:/usr/sbin:/sbin" ip -4 -o addr show dev "$n" 2>/dev/null)
    [ -z "$1" ] || address="inet $(cat "$i/address4" 2>/dev/null)"
    address=$(echo "$address" | sed -n 's/.*inet \\([0-9.]*\\).*/\\1/p' | head -n 1)
    state=$(cat "$i/operstate" 2>/dev/null)
    echo "interface $n $(cat "$i/type" 2>/dev/null) ${{state:-unknown}} ${{address:--}}"
done
while read -r name destination rest; do
    [ "$destination" != 00000000 ] || echo "default $name"
done < "$1/proc/net/route"
for h in "$1"/sys/class/infiniband/*/ports/*; do
    [ -d "$h" ] || continue
    device=${{h%/ports/*}}
    state=$(cat "$h/state" 2>/dev/null)
    echo "hca ${{device##*/}} ${{h##*/}} ${{state##*: }} $(cat "$h/link_layer" 2>/dev/null)"
done
for d in {_SCRATCH}; do
    [ -n "$d" ] && [ -d "$d" ] && [ -w "$d" ] || continue
    echo "disk $d $(df -k --output=fstype,avail "$d" 2>/dev/null | tail -n 1)"
done
[ -z "$SLURM_TMPDIR" ] || echo "own $SLURM_TMPDIR"
if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=memory.total,name --format=csv,noheader,nounits | sed 's/^/gpu /'
fi
exit 0
"""
_INFINIBAND = "32"
# Filesystems that several machines share, or that lie in memory.
_SHARED = re.compile(
    r"nfs|lustre|gpfs|beegfs|ceph|weka|panfs|fuse|9p|afs|smb|cifs|orangefs|glusterfs"
)
_IN_MEMORY = ("tmpfs", "ramfs", "rootfs")


@dataclass(frozen=True, slots=True)
class NodeFacts:
    host: str
    is_node: bool
    """Whether a node said it, and not the machine on which this is typed."""
    why_not: str = ""
    """Why no node was asked."""
    interfaces: dict[str, str] = field(default_factory=dict)
    """The interfaces that have an IPv4 address, and what they are: infiniband or ethernet."""
    default_interface: str = ""
    hcas: dict[str, str] = field(default_factory=dict)
    """The HCAs whose port is active, and their link layer: InfiniBand or Ethernet."""
    scratch: dict[str, int] = field(default_factory=dict)
    """Directories on disks of the node's own that can be written, with their free GiB."""
    job_directory: str = ""
    """The directory that SLURM has made for the job on the node (SLURM_TMPDIR)."""
    gpu_memory_gib: float | None = None
    gpu_name: str = ""

    @property
    def best_interface(self) -> str:
        """An interface of InfiniBand or Slingshot; empty where the default route's is as good."""
        for name, kind in sorted(self.interfaces.items()):
            if kind == "infiniband" or name.startswith("hsn"):
                return name
        return ""

    @property
    def best_scratch(self) -> str:
        """The directory with the most room; of equal ones the first."""
        return max(self.scratch, key=lambda name: self.scratch[name], default="")


def ask_node(options: Sequence[str], *, srun: bool) -> NodeFacts:
    """A node's answers, by srun with these options; this machine's where none is to be had."""
    why_not = "--no-srun was given"
    if srun:
        request = [
            "--nodes=1",
            "--ntasks=1",
            "--time=2",
            f"--immediate={_PATIENCE_S}",
            "--quiet",
            "--input=none",
        ]
        command = ["srun", *request, "--job-name=init-site", *options, "sh", "-c", SCRIPT, "sh", ""]
        try:
            done = ask(command, _DEADLINE_S, env=_outside_of_jobs())
            if done.returncode == 0:
                return parse(done.stdout, is_node=True)
            why_not = complaint(done.stderr)
        except (RunError, OSError) as error:
            why_not = str(error)
    done = ask(["sh", "-c", SCRIPT, "sh", ""], _DEADLINE_S)
    return parse(done.stdout, is_node=False, why_not=why_not)


def _outside_of_jobs() -> dict[str, str]:
    """Our environment without the job in which this may be typed."""
    own = os.environ
    return {name: own[name] for name in own if name == "SLURM_CONF" or name[:6] != "SLURM_"}


def parse(text: str, *, is_node: bool, why_not: str = "") -> NodeFacts:
    """The facts in what SCRIPT prints."""
    lines = [line.split(maxsplit=1) for line in text.splitlines()]
    told: dict[str, list[list[str]]] = {}
    for line in lines:
        if len(line) == 2:
            told.setdefault(line[0], []).append(line[1].split())
    interfaces = {}
    for name, kind, state, address in (words for words in told.get("interface", []) if words[3:]):
        if address != "-" and state != "down" and name != "lo":
            interfaces[name] = "infiniband" if kind == _INFINIBAND else "ethernet"
    hcas = {}
    for words in told.get("hca", []):
        if words[2:3] == ["ACTIVE"]:
            hcas[words[0]] = words[3] if words[3:] else "InfiniBand"
    scratch: dict[str, int] = {}
    for words in told.get("disk", []):
        if len(words) == 3 and words[1] not in _IN_MEMORY and not _SHARED.search(words[1]):
            scratch.setdefault(words[0], int(words[2]) // 1024**2)
    [host, *_] = [words[0] for words in told.get("host", [["?"]])]
    [default, *_] = [words[0] for words in told.get("default", [[""]])]
    [own, *_] = [words[0] for words in told.get("own", [[""]])]
    memory, name = None, ""
    for first, *rest in told.get("gpu", [])[:1]:
        if first.rstrip(",").isdigit():
            memory, name = int(first.rstrip(",")) / 1024, " ".join(rest)
    return NodeFacts(
        host=host,
        is_node=is_node,
        why_not=why_not,
        interfaces=interfaces,
        default_interface=default,
        hcas=hcas,
        scratch=scratch,
        job_directory=own,
        gpu_memory_gib=memory,
        gpu_name=name,
    )
