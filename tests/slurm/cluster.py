"""A real SLURM of several nodes on this host: slurmctld, a slurmd per node and its own munged.

    with SlurmCluster(num_nodes=4) as cluster:
        job_id = cluster.sbatch("--nodes=4", "--wrap=srun hostname")
        cluster.wait_state(job_id, "COMPLETED", timeout_s=30)

It works from Debian's slurm-wlm without systemd and without root; jobs run as the caller. A node
is a slurmd at 127.0.1.<i>. All nodes share the host's name, files and processes, so SIGKILL of a
slurmd leaves its job's processes alive. Without `accounting` sacct fails, as on many real clusters.
Requeued jobs wait 6 s, not 2 minutes.

A harder cluster is described by fields, for instance one of typed GPUs that takes what it will
never start, whose accounts are enforced and whose partitions have limits:

    SlurmCluster(
        gpus_per_node=8,
        gpu_types=("h100",),
        partitions=("short Default=YES MaxTime=30", "long MaxTime=240 GraceTime=60"),
        settings={"EnforcePartLimits": "NO"},
        accounting=Accounting(accounts=("physics", "biology")),
    )
"""

import dataclasses
import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from nanoslime.processes.logs import last_lines
from nanoslime.processes.ports import free_port
from tests import process_table
from tests.slurm.accounting import (
    Accounting,
    database_socket,
    install_database,
    user_name,
    write_slurmdbd_conf,
)

_FINAL_STATES = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
}
_SUBMITTER_VARIABLES = ("SLURM_", "SBATCH_")
_DAEMON_DEADLINE_S = 5.0
_SLURM_DAEMONS = ("slurmctld", "slurmd-")


@dataclasses.dataclass
class SlurmCluster:
    """Start with `start()` or as a context manager; `stop()` leaves no process and no file."""

    num_nodes: int = 4
    cpus_per_node: int = 2
    gpus_per_node: int = 0
    gpu_types: tuple[str, ...] = ()
    """The type of the GPUs of each node, or one type for all; none: GPUs without a type."""
    mem_per_node_mb: int = 16_000
    # Between SIGTERM and SIGKILL of a job that is cancelled or requeued.
    kill_wait_s: int = 5
    cluster_name: str = "test"
    partitions: tuple[str, ...] = (
        "main Default=YES PriorityTier=1",
        "urgent PriorityTier=10 PreemptMode=OFF",
    )
    """The lines of slurm.conf behind PartitionName=. All nodes are in each that names none."""
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Lines of slurm.conf in place of those below, or beside them, as JobRequeue."""
    accounting: Accounting | None = None
    """Accounts, in a slurmdbd of the cluster's own; starting it takes some seconds more."""
    directory: Path = dataclasses.field(init=False)
    daemons: dict[str, subprocess.Popen[bytes]] = dataclasses.field(
        init=False, default_factory=dict
    )

    @property
    def node_names(self) -> list[str]:
        return [f"n{i}" for i in range(1, self.num_nodes + 1)]

    @property
    def config_file(self) -> Path:
        return self.directory / "slurm.conf"

    @property
    def env(self) -> dict[str, str]:
        """The environment for commands that speak to this cluster."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(_SUBMITTER_VARIABLES)}
        env["SLURM_CONF"] = str(self.config_file)
        return env

    def __enter__(self) -> "SlurmCluster":
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> "SlurmCluster":
        """Start all daemons and wait until every node is idle.

        That takes well under a second on an idle machine, and without accounting. Raises
        RuntimeError with the ends of the daemons' logs when they do not come up.
        """
        # Paths of sockets must stay short.
        self.directory = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.directory.chmod(0o755)
        try:
            self._start_munge()
            accounting_port = self._start_accounting() if self.accounting else None
            self._start_slurm(accounting_port)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End jobs, daemons and whatever the jobs left running, then remove the directory."""
        try:
            self._cancel_all_jobs()
        finally:
            for name in reversed(list(self.daemons)):
                self._stop_daemon(name)
            self._end_left_processes()
            shutil.rmtree(self.directory, ignore_errors=True)

    def _end_left_processes(self) -> None:
        """Step daemons and job processes, also those that escaped SLURM by forking twice."""
        found = process_table.all_processes()
        left = set()
        for process in found.values():
            if self._is_ours(process) and process.pid != os.getpid():
                left.add(process)
                left |= process_table.descendants(process.pid, found)
        process_table.end(left)

    def run(
        self, *command: str, timeout_s: float = 30.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command against this cluster.

        The error of a command that fails holds its output and the ends of the daemons' logs.
        """
        try:
            result = subprocess.run(
                command, env=self.env, capture_output=True, text=True, timeout=timeout_s
            )
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(
                f"{command} ran longer than {timeout_s} s\n{self.log_tails()}"
            ) from error
        if check and result.returncode:
            output = result.stdout + result.stderr
            raise RuntimeError(
                f"{command} returned {result.returncode}:\n{output}\n{self.log_tails()}"
            )
        return result

    def sbatch(self, *arguments: str) -> int:
        """Submit and return the job id.

        What a --wrap prints goes into the cluster's directory, where no --output says otherwise.
        """
        options = [argument.partition("=")[0] for argument in arguments]
        defaults = []
        if "--wrap" in options and "--output" not in options:
            defaults.append(f"--output={self.directory}/job-%j.out")
        answer = self.run("sbatch", "--parsable", *defaults, *arguments).stdout
        return int(answer.strip().partition(";")[0])

    def job(self, job_id: int) -> dict[str, str]:
        """The fields of `scontrol show job`: JobState, NodeList, Restarts, Reason, StdOut, ..."""
        text = self.run("scontrol", "show", "job", "--oneliner", str(job_id)).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait_state(self, job_id: int, *states: str, timeout_s: float) -> dict[str, str]:
        """Wait until the job is in one of `states` and return its fields.

        Raises RuntimeError as soon as it has ended in another state, TimeoutError after
        `timeout_s`. A job that is requeued passes through PENDING, so wait for RUNNING before
        waiting for what comes after.
        """
        fields: dict[str, str] = {}

        def arrived() -> bool:
            fields.update(self.job(job_id))
            return fields["JobState"] in states or fields["JobState"] in _FINAL_STATES

        in_time = process_table.wait_for(arrived, timeout_s, interval_s=0.1)
        if in_time and fields["JobState"] in states:
            return fields
        error = RuntimeError if in_time else TimeoutError
        output = fields.get("StdOut")
        raise error(
            f"job {job_id} is {fields['JobState']} ({fields.get('Reason')}), "
            f"awaited {' or '.join(states)} for {timeout_s} s; "
            f"output: {output}\n{self._tail(output)}\n{self.log_tails()}"
        )

    def kill_node(self, name: str) -> None:
        """SIGKILL the node's slurmd and everything that it runs, as a power cut would."""
        daemon = self.daemons.pop(f"slurmd-{name}")
        found = process_table.all_processes()
        tasks = set()
        for process in found.values():
            if process.has_env("SLURMD_NODENAME", name) and self._is_ours(process):
                tasks.add(process)
                tasks |= process_table.descendants(process.pid, found)
        parents = {found[task.parent] for task in tasks if task.parent in found}
        step_daemons = {p for p in parents if p.command.startswith("slurmstepd")}
        # The step daemons go before their tasks, or they would still report the tasks' end.
        for group in ({found[daemon.pid]}, step_daemons, tasks):
            process_table.end(group, grace_s=0.0)
        daemon.wait(_DAEMON_DEADLINE_S)

    def start_dead_nodes(self) -> None:
        """Start the nodes that were killed; jobs may run on the others."""
        for name in self.node_names:
            if f"slurmd-{name}" not in self.daemons:
                self._spawn(f"slurmd-{name}", "slurmd", "-D", "-N", name)
        for name in self._nodes_in("down,drain"):
            self.run("scontrol", "update", f"nodename={name}", "state=resume", check=False)

    def reset(self) -> None:
        """Cancel every job, start the nodes that were killed, and wait until all nodes are idle."""
        self._cancel_all_jobs()
        self.start_dead_nodes()
        self._wait_idle(self.node_names)

    def log_tails(self, num_lines: int = 15) -> str:
        """The last lines of every daemon's log, slurmctld's first."""
        logs = (self.directory / "log").glob("*.log")
        logs = sorted(logs, key=lambda log: log.name != "slurmctld.log")
        return "\n".join(f"--- {log.name}\n{self._tail(log, num_lines)}" for log in logs)

    def _start_munge(self) -> None:
        for name in ("log", "state", "spool", "gpu", "munge"):
            (self.directory / name).mkdir()
        key = self.directory / "munge/key"
        socket_path = self.directory / "munge/socket"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self._spawn(
            "munged",
            "munged",
            "--foreground",
            "--force",
            "--num-threads=2",
            f"--key-file={key}",
            f"--socket={socket_path}",
            f"--pid-file={self.directory}/munge/pid",
            f"--seed-file={self.directory}/munge/seed",
        )
        ping = ["munge", "--no-input", f"--socket={socket_path}"]
        self._wait("munged answers", lambda: self._succeeds(*ping))

    def _start_accounting(self) -> int:
        """Starts MariaDB and slurmdbd; returns slurmdbd's port.

        The database's socket is there once it answers; slurmdbd has to make its tables first.
        """
        command = install_database(self.directory)
        self._spawn("mariadbd", *command)
        database = database_socket(self.directory)
        self._wait("mariadbd listens", database.exists)
        port = free_port("")
        write_slurmdbd_conf(self.directory, _host(), port)
        self._spawn("slurmdbd", "env", f"MYSQL_UNIX_PORT={database}", "slurmdbd", "-D")
        return port

    def _make_accounts(self, accounting: Accounting) -> None:
        """slurm.conf is there, and tells sacctmgr where slurmdbd listens."""
        listing = ["sacctmgr", "--noheader", "list", "cluster"]
        self._wait("slurmdbd answers", lambda: self._succeeds(*listing), timeout_s=120.0)
        for command in accounting.commands(self.cluster_name):
            self.run(*command)

    def _start_slurm(self, accounting_port: int | None, attempts: int = 3) -> None:
        """Ports are free when chosen; when one is taken before its daemon has it, choose again."""
        for attempt in range(1, attempts + 1):
            ports: set[int] = set()
            while len(ports) < 1 + self.num_nodes:
                ports.add(free_port(""))
            self._write_config(list(ports), accounting_port)
            if self.accounting is not None and attempt == 1:
                self._make_accounts(self.accounting)
            try:
                self._spawn("slurmctld", "slurmctld", "-D", "-i")
                for name in self.node_names:
                    self._spawn(f"slurmd-{name}", "slurmd", "-D", "-N", name)
                self._wait_idle(self.node_names)
                return
            except RuntimeError:
                if attempt == attempts or "Address already in use" not in self.log_tails():
                    raise
                for name in [name for name in self.daemons if name.startswith(_SLURM_DAEMONS)]:
                    self._stop_daemon(name)

    def _write_config(self, ports: list[int], accounting_port: int | None) -> None:
        """Write slurm.conf and gres.conf; `ports` are those of slurmctld and of each node."""
        directory = self.directory
        user = user_name()
        host = _host()
        node_lines = []
        for i, name in enumerate(self.node_names, start=1):
            gres = self._gres_of(i - 1)
            node_lines.append(
                f"NodeName={name} NodeHostname={host} NodeAddr=127.0.1.{i} Port={ports[i]} "
                f"CPUs={self.cpus_per_node} RealMemory={self.mem_per_node_mb} {gres}State=UNKNOWN"
            )
        nodes = "\n".join(node_lines)
        partitions = "\n".join(f"PartitionName={line}" for line in self.partitions)
        accounting = "AccountingStorageType=accounting_storage/none"
        if self.accounting is not None and accounting_port is not None:
            accounting = self.accounting.slurm_lines(directory, accounting_port)
        text = f"""\
ClusterName={self.cluster_name}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# the expiry is also how long a requeued job waits
AuthInfo=socket={directory}/munge/socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
# needs no cgroup access; a daemon that forks twice escapes it, which stop() covers
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
{accounting}
MpiDefault=none
# without CAP_SYS_RESOURCE the submitter's limits cannot be raised at launch
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
# believe CPUs and RealMemory below rather than the hardware
SlurmdParameters=config_overrides
ReturnToService=2
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait={self.kill_wait_s}
OverTimeLimit=0
MinJobAge=3600
CompleteWait=0
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE DefaultTime=30 State=UP
{partitions}
"""
        self.config_file.write_text(with_settings(text, self.settings))
        self._write_gres()

    def _gres_of(self, index: int) -> str:
        """The GPUs of a node in its line of slurm.conf."""
        if not self.gpus_per_node:
            return ""
        kind = self._gpu_type(index)
        return (
            f"Gres=gpu:{kind}:{self.gpus_per_node} " if kind else f"Gres=gpu:{self.gpus_per_node} "
        )

    def _gpu_type(self, index: int) -> str:
        if not self.gpu_types:
            return ""
        return self.gpu_types[index] if len(self.gpu_types) > 1 else self.gpu_types[0]

    def _write_gres(self) -> None:
        directory = self.directory
        for i in range(self.gpus_per_node):
            # slurmd wants a device file behind each GPU: with a bare count it reports none
            # and is drained.
            device = directory / f"gpu/nvidia{i}"
            device.unlink(missing_ok=True)
            device.symlink_to("/dev/null")
        gres_text = "AutoDetect=off\n"
        if self.gpus_per_node:
            devices = f"{directory}/gpu/nvidia[0-{self.gpus_per_node - 1}]"
            for index, name in enumerate(self.node_names):
                kind = self._gpu_type(index)
                typed = f"Type={kind} " if kind else ""
                gres_text += f"NodeName={name} Name=gpu {typed}File={devices}\n"
        (directory / "gres.conf").write_text(gres_text)

    def _wait_idle(self, names: list[str]) -> None:
        def idle() -> bool:
            if not self._succeeds("scontrol", "ping"):
                return False
            return set(names) <= set(self._nodes_in("idle"))

        self._wait(f"nodes {' '.join(names)} idle", idle)

    def _nodes_in(self, states: str) -> list[str]:
        listing = [
            "sinfo",
            "--noheader",
            "--Node",
            "--all",
            f"--states={states}",
            "--format=%N",
        ]
        return self.run(*listing).stdout.split()

    def _wait(self, what: str, condition, timeout_s: float = 30.0) -> None:
        def done() -> bool:
            dead = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            if dead:
                raise RuntimeError(
                    f"{', '.join(dead)} ended while waiting until {what}\n{self.log_tails()}"
                )
            return condition()

        if not process_table.wait_for(done, timeout_s):
            raise RuntimeError(f"waited {timeout_s} s until {what}\n{self.log_tails()}")

    def _spawn(self, name: str, *command: str) -> None:
        with open(self.directory / f"log/{name}.log", "ab") as log:
            self.daemons[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.env,
                start_new_session=True,
            )

    def _stop_daemon(self, name: str) -> None:
        daemon = self.daemons.pop(name)
        daemon.terminate()
        try:
            daemon.wait(_DAEMON_DEADLINE_S)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait(_DAEMON_DEADLINE_S)

    def _cancel_all_jobs(self) -> None:
        if not self._succeeds("scontrol", "ping"):
            return
        self.run("scancel", f"--user={user_name()}", check=False)

        def no_jobs() -> bool:
            """Whether no job is pending, running or completing."""
            return not self.run("squeue", "--noheader").stdout

        process_table.wait_for(no_jobs, self.kill_wait_s + 3.0, interval_s=0.1)

    def _succeeds(self, *command: str) -> bool:
        try:
            done = subprocess.run(command, env=self.env, capture_output=True, timeout=30)
        except subprocess.TimeoutExpired:  # as where there is no slurmctld yet
            return False
        return done.returncode == 0

    def _is_ours(self, process: process_table.Process) -> bool:
        return process.has_env("SLURM_CONF", str(self.config_file))

    @staticmethod
    def _tail(file: str | Path | None, num_lines: int = 15) -> str:
        try:
            return "\n".join(last_lines(Path(file or "/nonexistent"), num_lines))
        except OSError as error:
            return f"({error})"


def with_settings(text: str, settings: Mapping[str, str]) -> str:
    """slurm.conf with these settings: each takes the place of its line, or is a new line before the
    nodes.
    """
    lines = []
    for line in text.splitlines():
        name, _, _ = line.partition("=")
        if name not in settings:
            lines.append(line)
    first_node = next(i for i, line in enumerate(lines) if line.startswith("NodeName="))
    lines[first_node:first_node] = [f"{name}={value}" for name, value in settings.items()]
    return "\n".join(lines) + "\n"


def _host() -> str:
    return socket.gethostname().partition(".")[0]
