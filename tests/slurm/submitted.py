"""A run that a test has submitted to a real SLURM: its processes by their roles, the points that it
passes, and what its files tell of it afterwards.
"""

import json
import os
import re
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nanoslime.config.load import read
from nanoslime.layout import Layout
from nanoslime.run_dir import Attempt, RunDir
from tests import process_table
from tests.process_table import Process
from tests.slurm.cluster import SlurmCluster
from tools.submit import grpo as submit_grpo
from tools.submit.slurm_submit import submit_sbatch

# The first pattern that a command line matches tells the role of its process.
ROLES = {
    "srun": r"^srun ",
    "agent": r"jobs\.node \S+ --attempt ",
    "guard": r"jobs\.node ",
    "driver": r"nanoslime\.train --run ",
    "gcs": r"^\S*/gcs_server ",
    "raylet": r"^\S*/raylet/raylet ",
    "ray start": r"/ray start ",
    "trainer": r"^ray::RankActor",
    "rollout worker": r"^ray::WorkerActor",
    "sglang": r"sglang\.launch_server",
    "scheduler": r"^sglang::scheduler",
    "detokenizer": r"^sglang::detokenizer",
}
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE")
# A job that is requeued passes through states in which others end.
_NUM_ALIKE = 4
_LOOK_S = 0.5
_NUM_LOGS = 8
# So often SLURM is asked whether a job that is waited for still lives.
_ASK_S = 5.0


class Phase(NamedTuple):
    """The driver entered phase `name` of attempt `attempt`, when it had done `step` steps."""

    attempt: int
    time: float
    name: str
    step: int
    error: str | None


@dataclass(frozen=True)
class Submitted:
    cluster: SlurmCluster
    run: RunDir
    job_id: int

    @classmethod
    def begin(
        cls, cluster: SlurmCluster, root: Path, flags: Sequence[str], model: Path | None = None
    ) -> "Submitted":
        """Submits a rehearsal with these flags of jobs/submit_grpo.py, below `root`.

        model: the model/ of an earlier run with the same rehearsal, which is taken over.
        SLURM_CONF of this process names the cluster.
        """
        words = ["--prepare", "--run-root", str(root), "--cluster.submit", "sbatch", *flags]
        code = submit_grpo.main(words)
        assert code == 0, f"submit_grpo.py {' '.join(words)} was refused"
        run = RunDir.open(root / "rehearsal")
        if model is not None:
            shutil.copytree(model, run.model)
        layout = Layout.from_json(run.plan.read_text())
        job_id = submit_sbatch(read(run.config), layout, run)
        return cls(cluster, run, int(job_id))

    def processes(self) -> dict[Process, str]:
        """The processes of the run that live, each with its role, "other" where it has none."""
        found = process_table.all_processes()
        place = str(self.run.path)
        roots = {p for p in found.values() if place in p.command and p.pid != os.getpid()}
        family = set(roots)
        for root in roots:
            family |= process_table.descendants(root.pid, found)
        return {process: role_of(process.command) for process in family}

    def victims(self, role: str) -> list[Process]:
        """The processes of a role, the oldest first."""
        found = [process for process, its in self.processes().items() if its == role]
        return sorted(found, key=lambda process: process.started)

    def wait_for(
        self, condition: Callable[[], object], timeout_s: float, interval_s: float = 0.1
    ) -> None:
        """Waits until `condition()` holds. AssertionError where the job ends before."""
        deadline = time.monotonic() + timeout_s
        while not process_table.wait_for(condition, _ASK_S, interval_s):
            is_over = self.state() in OVER and self.wait_for_end(2 * _NUM_ALIKE * _LOOK_S) in OVER
            assert not is_over, f"the job ended first\n{self.log_ends()}"
            assert time.monotonic() < deadline, f"{timeout_s:g} s in vain\n{self.log_ends()}"

    def state(self) -> str:
        return self.cluster.job(self.job_id)["JobState"]

    def nodes(self) -> list[str]:
        """The names of the job's nodes."""
        listed = self.cluster.job(self.job_id)["NodeList"]
        return self.cluster.run("scontrol", "show", "hostnames", listed).stdout.split()

    def wait_for_end(self, timeout_s: float) -> str:
        """The state in which SLURM leaves the job; the present one where it has not ended."""
        deadline = time.monotonic() + timeout_s
        states: deque[str] = deque(maxlen=_NUM_ALIKE)
        while time.monotonic() < deadline:
            states.append(self.state())
            if len(states) == _NUM_ALIKE and set(states) <= {states[0]} & set(OVER):
                break
            time.sleep(_LOOK_S)
        return states[-1]

    def attempts(self) -> list[Attempt]:
        """The attempts of the run, in their order."""
        numbers = sorted(int(name) for name in os.listdir(self.run.attempts) if name.isdigit())
        return [Attempt(self.run, number) for number in numbers]

    def status(self) -> tuple[str, int]:
        """(phase, step) of the run now; ("", 0) before its first status."""
        with suppress(OSError, ValueError):
            status = json.loads((self.run.path / "status.json").read_bytes())
            return status["phase"], status["step"]
        return "", 0

    def phases(self) -> list[Phase]:
        """What the drivers of all attempts have told, in order."""
        found = []
        for attempt in self.attempts():
            for line in json_lines(attempt.phases):
                place = (line["time"], line["phase"], line["step"], line.get("error"))
                found.append(Phase(attempt.number, *place))
        return found

    def rows(self) -> list[dict[str, Any]]:
        """The metrics of the steps, as they stand in the run's file."""
        return json_lines(self.run.metrics)

    def recorded(self) -> dict[int, list[dict[str, Any]]]:
        """The recorded samples of each step."""
        found: dict[int, list[dict[str, Any]]] = {}
        for file in self.run.rollouts.glob("step_*-*.jsonl"):
            step = int(file.stem.removeprefix("step_").split("-")[0])
            found[step] = found.get(step, []) + json_lines(file)
        return found

    def log_ends(self) -> str:
        """Of the logs that were written last."""
        logs = [*self.run.path.rglob("*.log"), *self.run.path.glob("*.out")]
        files = sorted(logs, key=lambda file: file.stat().st_mtime)[-_NUM_LOGS:]
        ends = [f"--- {file}\n{file.read_text(errors='replace')[-1200:]}" for file in files]
        return "\n".join(ends)


def role_of(command: str) -> str:
    return next((role for role, known in ROLES.items() if re.search(known, command)), "other")


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """The process stands still meanwhile, unless it ends."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that may be written just now; none where it is not there."""
    if not path.exists():
        return []
    *whole, _ = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in whole]


def shared_memory(processes: Iterable[Process]) -> set[str]:
    """The names in /dev/shm that any of these processes has mapped or open."""
    found: set[str] = set()
    for process in processes:
        texts = []
        with suppress(OSError):
            texts.append(Path(f"/proc/{process.pid}/maps").read_text())
        with suppress(OSError):
            texts += [os.readlink(link) for link in Path(f"/proc/{process.pid}/fd").iterdir()]
        found |= set(re.findall(r"/dev/shm/(\S+)", "\n".join(texts)))
    return found & set(os.listdir("/dev/shm"))
