"""Where am I: on a SLURM cluster, or on a machine of one's own, where a rehearsal may start?

A rehearsal starts by itself only where nothing of SLURM exists: a shared login node on which a module was not
loaded must not be surprised by four Ray nodes.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nanoslime.processes.command import ask
from nanoslime.types import RunError

_COMMANDS = ("sbatch", "srun", "squeue", "sinfo", "scontrol")
_SOCKETS = ("run/munge/munge.socket.2", "var/run/munge/munge.socket.2")
_ANSWER_DEADLINE_S = 10.0


@dataclass(frozen=True, slots=True)
class Where:
    """`sbatch`: the one that answers, None without. `problem`: why the one that is there does not."""

    traces: tuple[str, ...]
    sbatch: Path | None = None
    problem: str = ""

    def has_slurm(self, *, local: bool) -> bool:
        """True: submit. False: rehearse, as `local` asks for. Raises RunError where neither is safe."""
        if local or not self.traces:
            return False
        if self.sbatch is None:
            raise RunError(
                f"there is no usable sbatch here{self.problem}, but this looks like a cluster: "
                f"{'; '.join(self.traces)}. Load the SLURM module (module load slurm) and try again, or add "
                "--local for a rehearsal on this machine alone"
            )
        return True


def detect(path: str, environ: Mapping[str, str], root: Path, cluster_file: Path | None) -> Where:
    """What of SLURM is below `root`, in PATH and in the environment, and whether sbatch answers."""
    commands = [command for command in _COMMANDS if shutil.which(command, path=path)]
    traces = [f"{', '.join(commands)} in PATH"] if commands else []
    traces += [f"configuration in {file}" for file in sorted(root.glob("etc/slurm*"))]
    traces += [
        f"{name} is set" for name in sorted(environ) if name.startswith(("SLURM_", "SBATCH_"))
    ]
    traces += [f"a munge socket ({root / name})" for name in _SOCKETS if (root / name).exists()]
    if cluster_file is not None:
        traces.append(f"a cluster file was given ({cluster_file})")
    sbatch = shutil.which("sbatch", path=path)
    if sbatch is None:
        return Where(tuple(traces))
    problem = _ask(sbatch, environ)
    return Where(tuple(traces), None if problem else Path(sbatch), problem)


def _ask(sbatch: str, environ: Mapping[str, str]) -> str:
    """Why `sbatch --version` gives no answer; empty where it does."""
    try:
        done = ask([sbatch, "--version"], _ANSWER_DEADLINE_S, env=dict(environ))
    except RunError as e:
        return f" ({e})"
    except OSError as e:
        return f" ({sbatch}: {e.strerror})"
    if done.returncode == 0:
        return ""
    said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return f" ({said})"


def test_only(sbatch: Path, script: str) -> str:
    """What `sbatch --test-only` says about a batch script: when it would start, or why it is refused."""
    done = ask([str(sbatch), "--test-only"], 60, stdin=script)
    said = " ".join((done.stderr + done.stdout).split())
    if done.returncode:
        raise RunError(f"sbatch --test-only refuses the job: {said}")
    return said
