"""Where am I: on a SLURM cluster, or on a machine of one's own, where a rehearsal may start?

A rehearsal starts by itself only where nothing of SLURM exists: a shared login node on which
a module was not loaded must not be surprised by four Ray nodes.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jobs.submission import complaint
from nanoslime.processes.command import ask
from nanoslime.run_dir import RunDir
from nanoslime.storage.shared_files import read_json
from nanoslime.types import RunError

_COMMANDS = ("sbatch", "srun", "squeue", "sinfo", "scontrol")
_SOCKETS = ("run/munge/munge.socket.2", "var/run/munge/munge.socket.2")
_ANSWER_DEADLINE_S = 10.0
_SUBMIT_DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True)
class Where:
    """What of SLURM was found: all that hints at a cluster, and a working sbatch."""

    traces: tuple[str, ...]
    # None where there is no sbatch, or where it does not answer.
    sbatch: str | None = None
    # Why the sbatch in PATH does not answer; empty where it does, or where there is none.
    problem: str = ""

    def has_slurm(self, *, local: bool) -> bool:
        """True: submit. False: rehearse. RunError where neither is safe.

        local: the user wants a rehearsal, whatever SLURM there is.
        """
        if local or not self.traces:
            return False
        if self.sbatch is None:
            problem = f" ({self.problem})" if self.problem else ""
            raise RunError(
                f"there is no usable sbatch here{problem}, but this looks like a cluster: "
                f"{'; '.join(self.traces)}. Load the SLURM module (module load slurm) and try "
                "again, or add --local for a rehearsal on this machine alone"
            )
        return True


def detect(path: str, environ: Mapping[str, str], root: Path, cluster_file: Path | None) -> Where:
    """Look for SLURM below `root`, in PATH and in the environment, and try sbatch."""
    traces = _traces(path, environ, root)
    if cluster_file is not None:
        traces.append(f"a cluster file was given ({cluster_file})")
    sbatch = shutil.which("sbatch", path=path)
    problem = _problem_of(sbatch, environ) if sbatch else ""
    return Where(tuple(traces), None if problem else sbatch, problem)


def _traces(path: str, environ: Mapping[str, str], root: Path) -> list[str]:
    traces = []
    commands = [command for command in _COMMANDS if shutil.which(command, path=path)]
    if commands:
        traces.append(f"{', '.join(commands)} in PATH")
    traces += [f"configuration in {file}" for file in sorted(root.glob("etc/slurm*"))]
    variables = [name for name in sorted(environ) if name.startswith(("SLURM_", "SBATCH_"))]
    traces += [f"{name} is set" for name in variables]
    sockets = [root / name for name in _SOCKETS]
    return traces + [f"a munge socket ({socket})" for socket in sockets if socket.exists()]


def _problem_of(sbatch: str, environ: Mapping[str, str]) -> str:
    """Why `sbatch --version` gives no answer; empty where it does."""
    try:
        done = ask([sbatch, "--version"], _ANSWER_DEADLINE_S, env=environ)
    except RunError as error:
        return str(error)
    except OSError as error:
        return f"{sbatch}: {error.strerror}"
    if done.returncode == 0:
        return ""
    errors = done.stderr.strip().splitlines()
    return errors[-1] if errors else f"exit code {done.returncode}"


def test_only(sbatch: str, script: str) -> str:
    """The answer of `sbatch --test-only` to a batch script: when it would start.

    Raises RunError with the reason why SLURM refuses it.
    """
    done = ask([sbatch, "--test-only"], _SUBMIT_DEADLINE_S, stdin=script)
    answer = " ".join((done.stderr + done.stdout).split())
    if done.returncode:
        raise RunError(f"sbatch --test-only refuses the job: {answer}")
    return answer


def refuse_if_job_lives(run: RunDir) -> bool:
    """RunError where the run's job pends or runs; returns whether SLURM says that it does not.

    False: it was never submitted, or there is no SLURM here that could say.
    """
    if not run.job.exists() or shutil.which("squeue") is None:
        return False
    job_id = str(read_json(run.job)["job_id"])
    user = f"--user={run.job.stat().st_uid}"
    command = ["squeue", "--noheader", "--array", user, "--format=%i %T %r"]
    listed = ask(command, _ANSWER_DEADLINE_S)
    if listed.returncode:
        raise RunError(
            f"squeue cannot say whether job {job_id} of {run.path} is over: "
            f"{complaint(listed.stderr)}; try again when SLURM answers"
        )
    for line in listed.stdout.splitlines():
        number, state, reason = line.split(maxsplit=2)
        if number == job_id:
            raise RunError(
                f"job {job_id} still holds {run.path}: it is {state} ({reason}), and two jobs "
                f"would train in one directory; end it with `scancel {job_id}`, wait until "
                "squeue no longer shows it, and resume again"
            )
    return True
