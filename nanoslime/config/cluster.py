"""A cluster or one machine: what a node has, how jobs are asked for, where runs go.

A cluster's values stand in env/clusters/*.yaml.
"""

import re
from collections.abc import Iterator
from typing import Literal, Self

from pydantic import Field, model_validator

from nanoslime.config.base import SECRET_NAME, Minutes, PathText, SbatchOptions, Text, knobs

# A value that a shell takes from somewhere else ($...) is none.
_SECRET = re.compile(rf"\b({SECRET_NAME})=[\"']?[^\s\"'$`]", re.IGNORECASE)

# What a job needs at most to end once its driver has.
_LEAVE_S = 60.0
MAX_SCRATCH_BYTES = 23
"""Of 107 for a socket, /ns-NODE-ATTEMPT/ray/session_TIME_PID/sockets/plasma_store takes 84."""
_VARIABLE = re.compile(r"[A-Za-z_]\w*")
_OPTION = re.compile(r"[a-z][a-z0-9-]*")
# The fields that are options of sbatch by the same names.
_SBATCH_FIELDS = (
    "account",
    "comment",
    "constraint",
    "dependency",
    "exclude",
    "exclusive",
    "mail_type",
    "mail_user",
    "nodelist",
    "partition",
    "qos",
    "reservation",
)


@knobs
class ClusterConfig:
    name: str = "local"
    """What the cluster is called in messages."""
    nodes: int = Field(default=1, ge=1, le=10_000)
    """Nodes of the job; trainers take the first ones, engines the last."""
    rollout_nodes: int | None = Field(default=None, ge=0)
    """Nodes that hold engines only; default: half of the nodes (rounded down), 0 with
    one node."""
    gpus_per_node: int = Field(default=0, ge=0, le=1_000)
    """0: a CPU cluster, on which trainers run on gloo and SGLang by its CPU recipe."""
    slots_per_node: int = Field(default=2, ge=1, le=1_000)
    """Ranks or engines per node where there are no GPUs."""
    engine_gpus: int | None = Field(default=None, ge=0)
    """With one node: its GPUs (or slots) that engines take. Default: half, and 0 for the
    embedded engine."""
    colocate: bool = False
    """Engines run on the trainers' own GPUs, on all nodes; one of the two sleeps while
    the other works."""
    gpu_memory_gib: float = Field(default=80.0, gt=0)
    """Memory of one GPU, in GiB."""
    gpu_tflops: float = Field(default=990.0, gt=0)
    """Dense bfloat16 arithmetic of one GPU, in TFLOP/s; this and the three speeds below are for
    --tune alone. Default: an H100 or H200 (NVIDIA's data sheets)."""
    gpu_memory_gb_s: float = Field(default=3350.0, gt=0)
    """Bandwidth of one GPU's memory, in GB/s. Default: an H100; an H200 has 4800."""
    nvlink_gb_s: float = Field(default=450.0, gt=0)
    """What a GPU sends to the others of its node, in GB/s. Default: NVLink 4, one direction."""
    network_gb_s: float = Field(default=50.0, gt=0)
    """What a GPU sends to other nodes, in GB/s. Default: a port of 400 Gb/s for each GPU."""
    cpus_per_node: int | None = Field(default=None, ge=1)
    """Cores that the job asks for on each node; default: 8 for each GPU, or 1 for each slot."""
    memory_per_node: str = ""
    """Memory as sbatch --mem takes it; empty: the site's default."""
    gpu_request: str = Field(
        default="gpus-per-node", pattern=r"^(gpus-per-node|gres:gpu(:[\w.+-]+)?|none)$"
    )
    """How a job asks for its GPUs: gpus-per-node, gres:gpu, gres:gpu:TYPE, or none where the
    partition gives whole nodes and refuses both."""
    partition: Text = ""
    """The partition, or several with commas between them; empty: the site's default."""
    account: Text = ""
    """The account that pays for the job; empty: the user's default."""
    qos: Text = ""
    """The quality of service that the job asks for."""
    constraint: Text = ""
    """Features that its nodes must have, as sbatch --constraint takes them (`h100&nvlink`)."""
    reservation: Text = ""
    """The reservation whose nodes the job takes."""
    exclude: str = ""
    """Nodes that the job must not get, as SLURM lists them (`n[3-4],n7`)."""
    nodelist: str = ""
    """Nodes that must be among the job's, as SLURM lists them."""
    dependency: str = ""
    """What the job waits for, as sbatch --dependency takes it (`afterok:1234`). A run that is
    resumed does not wait for it again."""
    exclusive: bool | Literal["user", "mcs"] = False
    """Whether the job shares its nodes with no other one, or with its user's own only."""
    comment: str = ""
    """A comment that SLURM keeps with the job; some sites account by it."""
    mail_user: Text = ""
    """Who gets SLURM's mails about the job; empty: nobody."""
    mail_type: str = "END,FAIL"
    """When SLURM sends a mail: sbatch's words, with commas between them."""
    srun_options: list[Text] = Field(default_factory=list)
    """Further options of the srun that starts the agents, each whole (`--mpi=none`)."""
    max_time_min: Minutes | None = Field(default=None, ge=1)
    """The longest job that the site allows; a longer one is refused."""
    max_gpu_hours: float | None = Field(default=None, gt=0)
    """The GPU hours that one job may ask for (node hours where there are no GPUs); a plan for
    more is refused."""
    time_limit_min: Minutes = Field(default=240, ge=1)
    """The time limit of a job, after which it goes on in another one."""
    signal_lead_s: int = Field(default=300, ge=30)
    """Seconds before the time limit at which the job is told to commit and to go on later. A run
    that is resumed takes what its saves and steps have needed instead, unless a flag sets it."""
    preemption_grace_s: int | None = Field(default=None, ge=0)
    """Seconds that a job has to leave when it is preempted, where SLURM does not say it by the
    partition's GraceTime."""
    requeue: bool = True
    """Whether the site lets a job be requeued; where it does not, jobs go on by a chain."""
    resume_by: Literal["requeue", "chain"] = "requeue"
    """How a job goes on: SLURM starts it anew, or, where a site forbids that, it submits another
    one that depends on its end; by sbatch then, whatever `submit` says."""
    max_requeues: int = Field(default=10, ge=0)
    """How often in a row a job requeues itself, after a stop or a fault of a machine, without
    a new commit."""
    extra_sbatch: SbatchOptions = Field(default_factory=dict)
    """Further sbatch options, without the leading dashes."""
    modules: list[Text] = Field(default_factory=list)
    """Environment modules that the job loads before anything else (`module load`)."""
    setup: list[str] = Field(default_factory=list)
    """Shell lines run before the job step, after the modules are loaded."""
    env: dict[str, Text] = Field(default_factory=dict)
    """Environment of the job, with `~` and $NAME as where it is submitted. Never secrets."""
    nccl: dict[str, Text] = Field(default_factory=dict)
    """NCCL's settings, with or without the NCCL_ of their names (`DEBUG: WARN`)."""
    network_interface: str = ""
    """Interface whose address a node publishes and NCCL and gloo use; empty: that of
    the default route. Of several with commas between them the first one is published."""
    infiniband_hcas: str = ""
    """The HCAs that NCCL uses, as NCCL_IB_HCA takes them (`mlx5_0,mlx5_1`); empty: all."""
    container: Literal["none", "pyxis", "apptainer"] = "none"
    """What starts the agents in a container image: pyxis is a plugin of srun for enroot's images,
    apptainer is started within the step."""
    container_image: Text = ""
    """The image: what pyxis takes (a path ending in .sqsh, or registry#name:tag), or apptainer (a
    .sif, or docker://name:tag)."""
    container_mounts: list[Text] = Field(default_factory=list)
    """What the container sees beside the run's directory: PATH, or SOURCE:TARGET[:OPTIONS]. Model,
    prompts, and the environment where it is not in the image, have to be among it."""
    container_options: list[Text] = Field(default_factory=list)
    """Further options of `apptainer exec`, each whole (`--cleanenv`)."""
    scratch: PathText = ""
    """A directory on each node's own disk, for sockets and temporary files; empty: SLURM_TMPDIR
    or TMPDIR of the node where short enough for the names of sockets, else /tmp."""
    caches: PathText = ""
    """Where jobs keep what they compile and download, one directory for each kind; empty: in
    local_storage, or where each library keeps it."""
    measure_links: bool | None = None
    """Whether the nodes' links are measured before Ray starts, which takes some seconds; default:
    where expected_gbps is set."""
    expected_gbps: float | None = Field(default=None, gt=0)
    """GB/s (not Gbit/s) that one process a node is to send to another one; nodes with less than
    half of it are left out."""
    local_storage: PathText = ""
    """A directory on each node's own disk, which outlives the job: the model is copied there once,
    and compiled kernels are kept there; empty: all nodes read the shared model."""
    stage_model: bool = True
    """Whether each node copies the model to `local_storage`, where that is set."""
    stage_environment: bool = False
    """Whether each node copies the virtual environment to `local_storage`, too, and starts its
    engines and trainers from there; it is packed into one file when the run is submitted."""
    stage_deadline_s: float = Field(default=3600.0, gt=0)
    """How long a node may copy the model and the environment; then it reads the shared ones."""
    run_root: PathText = ""
    """Where runs' directories are made, on a filesystem that all nodes see; empty: `runs` in the
    directory of the submission."""
    script_template: PathText = ""
    """A batch script of the site's own, with the lines @directives@, @setup@ and @step@ in it, each
    once, which are replaced; submitted by sbatch then, whatever `submit` says."""
    share: Text = ""
    """A group that may read the runs' directories (mode 2750), but not their secrets; empty: nobody
    else may (0700)."""
    venv: PathText = ""
    """Virtual environment of the compute nodes, in a container that of the image; empty: the
    environment that submits, or the container's `python`."""
    conda: Text = ""
    """Conda environment of the compute nodes, by name or path, in place of venv."""
    submit: Literal["submitit", "sbatch"] = "submitit"
    """What hands the job to SLURM."""
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
        variables = {**self.env, **self.nccl}
        lines = [*self.setup, *self.srun_options, *self.container_options]
        lines += [*self.extra_sbatch.values(), *(f"{name}={variables[name]}" for name in variables)]
        if found := _SECRET.search("\n".join(lines)):
            raise ValueError(
                f"cluster.env and cluster.setup would write {found[1]} into the run's files; "
                f"export {found[1]} in the shell that submits, which the job inherits"
            )
        return self

    @model_validator(mode="after")
    def _can_be_written_down(self) -> Self:
        """What would break out of its line of the batch script is refused."""
        for option, value in self.directives():
            if not _OPTION.fullmatch(option):
                raise ValueError(
                    f"cluster.extra_sbatch: {option!r} is no option of sbatch; write its long name "
                    "without the dashes, as in `nice: 100`"
                )
            if "\n" in str(value) or "\r" in str(value):
                raise ValueError(
                    f"sbatch's --{option}={value!r} has a line break, and a directive of a batch "
                    "script is one line; leave the line break out"
                )
        for name in self.variables:
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"cluster.env: {name!r} is no name of an environment variable")
        for name in self._nccl_variables.keys() & self.env.keys():
            raise ValueError(
                f"cluster.env has {name}, which cluster.nccl or cluster.infiniband_hcas sets too; "
                "keep one of them"
            )
        for option in [*self.srun_options, *self.container_options]:
            if not option.startswith("-"):
                raise ValueError(
                    f"cluster.srun_options and cluster.container_options: {option!r} is no option; "
                    "write each one with its dashes and its value, as in `--mpi=none`"
                )
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.container != "none" and not self.container_image:
            raise ValueError(
                f"cluster.container={self.container} needs cluster.container_image, the image to "
                "start the agents in"
            )
        if self.container == "none" and (self.container_image or self.container_mounts):
            raise ValueError(
                "cluster.container_image and cluster.container_mounts have no effect with "
                "cluster.container=none; set it to pyxis or apptainer, or leave them out"
            )
        if len(self.scratch.encode()) > MAX_SCRATCH_BYTES:
            raise ValueError(
                f"cluster.scratch={self.scratch!r} has more than the {MAX_SCRATCH_BYTES} bytes "
                "that leave room for the names of Ray's sockets (107 bytes with their path); "
                "choose a shorter path, or leave it out"
            )
        if self.venv and self.conda:
            raise ValueError(
                f"cluster.venv={self.venv!r} and cluster.conda={self.conda!r} are two environments "
                "for one job; keep one of them"
            )
        if self.stage_environment and not self.local_storage:
            raise ValueError(
                "cluster.stage_environment copies the environment to cluster.local_storage, which "
                "is not set; name a directory on each node's own disk"
            )
        if self.stage_environment and (self.conda or self.container != "none"):
            raise ValueError(
                "cluster.stage_environment copies a virtual environment, and not one of conda or "
                "of a container; leave it out, or use cluster.venv"
            )
        if self.max_time_min is not None and self.time_limit_min > self.max_time_min:
            raise ValueError(
                f"cluster.time_limit_min={self.time_limit_min} is above cluster.max_time_min="
                f"{self.max_time_min}, the longest job of this site; lower it: a run goes on in "
                "the next job"
            )
        each = f" of {self.gpus_per_node} GPUs" if self.gpus_per_node else ""
        hours = self.nodes * max(1, self.gpus_per_node) * self.time_limit_min / 60
        if self.max_gpu_hours is not None and hours > self.max_gpu_hours:
            raise ValueError(
                f"cluster.max_gpu_hours={self.max_gpu_hours:g} is below the {hours:g} hours of "
                f"{self.nodes} nodes{each} for {self.time_limit_min / 60:g} h; ask for fewer nodes "
                "(cluster.nodes) or less time (cluster.time_limit_min)"
            )
        return self

    def directives(self) -> Iterator[tuple[str, str | bool]]:
        """What a job asks SLURM for by the site's fields: sbatch's long options and their values;
        of two with one name the last counts.
        """
        for name in _SBATCH_FIELDS:
            value = getattr(self, name)
            if value and (name != "mail_type" or self.mail_user):
                yield name.replace("_", "-"), value
        yield from self.extra_sbatch.items()

    @property
    def variables(self) -> dict[str, str]:
        """The environment that the job's processes get: `env`, and what `nccl` and
        `infiniband_hcas` stand for.
        """
        return {**self._nccl_variables, **self.env}

    @property
    def _nccl_variables(self) -> dict[str, str]:
        found = {f"NCCL_{name.removeprefix('NCCL_')}": value for name, value in self.nccl.items()}
        if self.infiniband_hcas:
            found["NCCL_IB_HCA"] = self.infiniband_hcas
        return found

    @property
    def goes_on_by(self) -> Literal["requeue", "chain"]:
        """`resume_by`, where the site lets jobs be requeued."""
        return self.resume_by if self.requeue else "chain"

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
