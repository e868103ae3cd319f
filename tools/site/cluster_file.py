"""The text of a cluster's file: each line with where its value comes from.

Pure; what the file means is nanoslime/config/cluster.py's. A fact that is no more than a hint
stands as a comment.
"""

from dataclasses import dataclass

import yaml

from tools.site.node_facts import NodeFacts
from tools.site.questions import Answers
from tools.site.slurm import Cluster, Share, slice_gb

_DEFAULT_LIMIT_MIN = 1440
_DEFAULT_LEAD_S = 300
_MIN_LEAD_S = 30
# GiB that torch sees of these, where no node could be asked. Of types that come in two sizes it is
# the smaller one.
_MEMORY_GIB = {
    "b200": 178,
    "h200": 140,
    "h100": 79,
    "h800": 79,
    "gh200": 94,
    "a100": 39,
    "a800": 79,
    "a40": 44,
    "a6000": 47,
    "l40s": 44,
    "l40": 44,
    "l4": 22,
    "a10": 22,
    "v100": 15,
    "rtx4090": 23,
    "rtx3090": 23,
}


@dataclass(frozen=True, slots=True)
class Request:
    """What jobs of this cluster will ask for."""

    cluster: Cluster
    answers: Answers
    max_time_min: int | None
    share: Share
    """What they get of a node, which may be less than it has."""

    @property
    def time_limit_min(self) -> int:
        return min(self.max_time_min or _DEFAULT_LIMIT_MIN, _DEFAULT_LIMIT_MIN)

    @property
    def signal_lead_s(self) -> int:
        """No longer than a preempted job is left, and than a quarter of a short job."""
        lead_s = min(_DEFAULT_LEAD_S, self.time_limit_min * 60 // 4)
        if self.answers.partition.grace_s:
            lead_s = min(lead_s, self.answers.partition.grace_s)
        return max(lead_s, _MIN_LEAD_S)


def text(request: Request, node: NodeFacts) -> str:
    """The file."""
    version = request.cluster.config.get("SLURM_VERSION", "")
    lines = [
        f"# The cluster {request.cluster.name}, SLURM {version}, as `jobs/init_site.py` found it.",
        "# Whatever is wrong may be changed here; README has the other fields.",
        _entry("name", request.cluster.name),
        *_nodes(request, node),
        *_rights(request),
        *_time(request),
        *_node(node),
        *_places(request),
    ]
    return "\n".join(lines) + "\n"


def _nodes(request: Request, node: NodeFacts) -> list[str]:
    kind = request.answers.kind
    lines = ["", f"# {kind.count} nodes are alike: {kind.nodes}"]
    own = [other for other in request.cluster.kinds if other.partition == kind.partition]
    for other in own:
        if other != kind:
            gpus = f"{other.gpus} x {other.gpu_type or 'GPU'}, " if other.gpus else ""
            lines.append(
                f"# others: {other.count} of {gpus}{other.cpus} cores, {other.memory_mb} MB: "
                f"{other.nodes}"
            )
    lines.append(_entry("gpus_per_node", kind.gpus))
    if kind.gpus:
        gib, source = _gpu_memory_gib(kind.gpu_type, node)
        lines.append(_entry("gpu_memory_gib", gib, source))
        types = {other.gpu_type for other in own if other.gpus}
        are_several = len(types) > 1 or kind.has_other_gpus
        asked_by = f"gres:gpu:{kind.gpu_type}" if are_several and kind.gpu_type else "gpus-per-node"
        lines.append(_entry("gpu_request", asked_by, "a type is named where there are several"))
    share = request.share
    reason = f"of {kind.cpus}, all that SLURM gives" if share.cpus < kind.cpus else ""
    lines.append(_entry("cpus_per_node", share.cpus, reason))
    if share.memory_mb > 1:
        lines.append(_entry("memory_per_node", f"{share.memory_mb}M", "all that SLURM gives"))
    if kind.features:
        lines.append(_comment("constraint", "&".join(kind.features), "the features of these nodes"))
    return lines


def _gpu_memory_gib(gpu_type: str, node: NodeFacts) -> tuple[float, str]:
    """The memory of a GPU, and who says so."""
    if (slice_ := slice_gb(gpu_type)) is not None:
        # nvidia-smi tells that of the whole GPU.
        return round(slice_ * 1e9 / 2**30, 1), f"that of a slice by its type, {gpu_type}"
    if node.gpu_memory_gib is not None:
        return round(node.gpu_memory_gib, 1), f"nvidia-smi: {node.gpu_name}"
    plain = gpu_type.lower().replace("-", "").replace("_", "")
    for name, gib in sorted(_MEMORY_GIB.items(), key=lambda item: -len(item[0])):
        if name in plain:
            return gib, f"the least that GPUs named {name} have; nvidia-smi did not tell it"
    return 80, "CHECK: neither nvidia-smi nor the type of the GPUs tells it"


def _rights(request: Request) -> list[str]:
    lines = ["", _entry("partition", request.answers.partition.name)]
    if request.answers.account:
        is_enforced = request.cluster.enforces_accounts
        source = "enforced by SLURM" if is_enforced else "not enforced by SLURM"
        lines.append(_entry("account", request.answers.account, source))
    if request.answers.qos:
        lines.append(_entry("qos", request.answers.qos, "the partition does not take the default"))
    return lines


def _time(request: Request) -> list[str]:
    partition = request.answers.partition
    lines = ["", _entry("time_limit_min", request.time_limit_min)]
    if request.max_time_min is not None:
        lines.append(_entry("max_time_min", request.max_time_min, "of partition, account and QOS"))
    reason = "a preempted job is left so long (GraceTime)" if partition.grace_s else ""
    lines.append(_entry("signal_lead_s", request.signal_lead_s, reason))
    if request.cluster.config.get("JobRequeue") == "0":
        lines += [
            "# JobRequeue=0: SLURM requeues only jobs that ask for it, as ours do. Where the site",
            "# forbids that, set `resume_by: chain`.",
        ]
    return lines


def _node(node: NodeFacts) -> list[str]:
    place = f"node {node.host}" if node.is_node else f"{node.host}, no node: {node.why_not}"
    lines = ["", f"# asked: {' '.join(place.split())}"]
    if node.best_interface:
        lines.append(_entry("network_interface", node.best_interface, "that of the fast network"))
    else:
        of_default_route = node.default_interface or "that of the default route"
        lines.append(
            _comment("network_interface", of_default_route, "the default route's is taken")
        )
    if node.hcas:
        layers = " and ".join(sorted(set(node.hcas.values())))
        lines.append(_entry("infiniband_hcas", ",".join(node.hcas), f"active ports, {layers}"))
    if node.job_directory:
        lines.append(_comment("scratch", node.job_directory, "SLURM_TMPDIR of the job is taken"))
    elif node.best_scratch:
        free = f"{node.scratch[node.best_scratch]} GiB free on the node's own disk"
        entry = _comment if node.best_scratch == "/tmp" else _entry
        lines.append(entry("scratch", node.best_scratch, free))
    return lines


def _places(request: Request) -> list[str]:
    return [
        "",
        _entry("run_root", str(request.answers.run_root)),
        _entry("venv", str(request.answers.venv)),
    ]


def _entry(name: str, value: object, source: str = "") -> str:
    """A line of YAML."""
    line = yaml.safe_dump({name: value}, width=1000, allow_unicode=True).strip()
    return f"{line:30}  # {source}" if source else line


def _comment(name: str, value: object, source: str) -> str:
    return f"# {_entry(name, value, source)}"
