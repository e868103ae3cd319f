"""A cluster or one machine: what a node has, how jobs are asked for, where runs go.

A cluster's values stand in env/clusters/*.yaml.
"""

import re
from typing import Literal, Self

from pydantic import Field, model_validator

from nanoslime.config.base import knobs

# A value that a shell takes from somewhere else ($...) is none.
_SECRET = re.compile(r"\b(\w*(?:TOKEN|API_KEY|SECRET\w*|PASSWORD))=[\"']?[^\s\"'$`]", re.IGNORECASE)

# What a job needs at most to end once its driver has.
_LEAVE_S = 60.0


@knobs
class ClusterConfig:
    name: str = "local"
    """What the cluster is called in messages."""
    nodes: int = Field(default=1, ge=1)
    """Nodes of the job; trainers take the first ones, engines the last."""
    rollout_nodes: int | None = Field(default=None, ge=0)
    """Nodes that hold engines only; default: half of the nodes (rounded down), 0 with
    one node."""
    gpus_per_node: int = Field(default=0, ge=0)
    """0: a CPU cluster, on which trainers run on gloo and SGLang by its CPU recipe."""
    slots_per_node: int = Field(default=2, ge=1)
    """Ranks or engines per node where there are no GPUs."""
    engine_gpus: int | None = Field(default=None, ge=0)
    """With one node: its GPUs (or slots) that engines take. Default: half, and 0 for the
    embedded engine."""
    colocate: bool = False
    """Engines run on the trainers' own GPUs, on all nodes; one of the two sleeps while
    the other works."""
    gpu_memory_gib: float = Field(default=80.0, gt=0)
    """Memory of one GPU, in GiB."""
    cpus_per_node: int | None = Field(default=None, ge=1)
    """Cores that the job asks for on each node; default: 8 for each GPU, or 1 for each slot."""
    memory_per_node: str = ""
    """Memory as sbatch --mem takes it; empty: the site's default."""
    partition: str = ""
    """Partition that the job is submitted to; empty: the site's default."""
    account: str = ""
    """Account that the job is charged to; empty: the user's default."""
    qos: str = ""
    """Quality of service of the job; empty: the user's default."""
    constraint: str = ""
    """Features that the nodes must have, as sbatch --constraint takes them."""
    reservation: str = ""
    """Reservation that the job runs in; empty: none."""
    time_limit_min: int = Field(default=240, ge=1)
    """Time limit of the job, in minutes."""
    signal_lead_s: int = Field(default=300, ge=30)
    """Seconds before the time limit at which the job is told to commit and to go on later. A run
    that is resumed takes what its saves and steps have needed instead, unless a flag sets it."""
    resume_by: Literal["requeue", "chain"] = "requeue"
    """How a job goes on: SLURM starts it anew, or, where a site forbids that, it submits another
    one that depends on its end; by sbatch then, whatever `submit` says."""
    max_requeues: int = Field(default=10, ge=0)
    """How often in a row a job requeues itself, after a stop or a fault of a machine, without
    a new commit."""
    extra_sbatch: dict[str, str] = Field(default_factory=dict)
    """Further sbatch options, without the leading dashes."""
    setup: list[str] = Field(default_factory=list)
    """Shell lines run before the job step (module load ...)."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment of the job (NCCL_IB_HCA ...). Never secrets."""
    network_interface: str = ""
    """Interface whose address a node publishes and NCCL and gloo use; empty: that of
    the default route."""
    run_root: str = ""
    """Directory of the runs, on a filesystem that all nodes see; empty: runs/ in the current
    directory."""
    share: str = ""
    """A group that may read the runs' directories (mode 2750), but not their secrets; empty: nobody
    else may (0700)."""
    venv: str = ""
    """Virtual environment of the compute nodes; empty: the environment that submits."""
    submit: Literal["submitit", "sbatch"] = "submitit"
    """What hands the job to SLURM: the package submitit, or plain sbatch."""
    ray_start_deadline_s: float = Field(default=300.0, gt=0)
    """How long a node waits for Ray's head to start."""
    node_join_deadline_s: float = Field(default=300.0, gt=0)
    """How long the run waits for all its nodes to join Ray."""
    gpu_probe_deadline_s: float = Field(default=180.0, gt=0)
    """How long torch may take on a node to start and to find its GPUs."""
    hang_factor: float = Field(default=8.0, gt=1)
    """A phase that takes so many times its median hangs: the attempt ends, with all stacks."""
    hang_floor_s: float = Field(default=90.0, gt=0)
    """No phase hangs before it has taken so long."""
    hang_deadline_s: float = Field(default=7200.0, gt=0)
    """How long a phase may take that the attempt has not been through three times."""

    @model_validator(mode="after")
    def _has_no_secret(self) -> Self:
        """What stands here is written into the run's directory, its batch script and its log."""
        lines = [*self.setup, *(f"{name}={value}" for name, value in self.env.items())]
        if found := _SECRET.search("\n".join(lines)):
            raise ValueError(
                f"cluster.env and cluster.setup would write {found[1]} into the run's files; "
                f"export {found[1]} in the shell that submits, which the job inherits"
            )
        return self

    @property
    def slots(self) -> int:
        """GPUs of a node, or CPU slots where it has none."""
        return self.gpus_per_node or self.slots_per_node

    @property
    def drain_s(self) -> float:
        """How long a driver that is told to stop may take to commit, before it is ended."""
        return max(0.8 * self.signal_lead_s, self.signal_lead_s - _LEAVE_S)

    @property
    def device(self) -> Literal["cuda", "cpu"]:
        return "cuda" if self.gpus_per_node else "cpu"
