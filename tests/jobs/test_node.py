"""The node agent: bad machines end in one line, any death ends the attempt, nothing stays."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest

from jobs import agent as agent_module
from jobs import ray_node
from jobs.agent import Agent, AttemptOver
from jobs.checkout import ROOT
from jobs.cluster_env import ClusterEnv, interface_address, scratch_root
from jobs.leaving import failure_of_driver
from jobs.ray_node import cuda_home
from nanoslime.config import ClusterConfig
from nanoslime.processes.child import ChildProcess
from nanoslime.run_dir import DONE, FAILED, STOPPED, Attempt, RunDir
from nanoslime.types import MachineFailure, RunError
from tests import process_table
from tests.jobs.made_run import (
    HOSTILE,
    MadeRun,
    driver,
    make_run,
    make_venv_with_fake_ray,
    scratches,
)
from tools.preflight.gpus import check_driver, check_gpus
from tools.preflight.node import check_cores
from tools.submit.local import run_local

_DEADLINE_S = 120.0
RUN_LOCAL = """
import sys
from dataclasses import replace
from pathlib import Path
from tools.submit.local import run_local
from nanoslime.config.load import read
from nanoslime.layout import Layout
from nanoslime.run_dir import RunDir

run = RunDir.open(Path(sys.argv[1]))
layout = Layout.from_json(run.plan.read_text())
config = read(run.config)
config = replace(config, cluster=replace(config.cluster, max_requeues=int(sys.argv[3])))
sys.exit(run_local(config, layout, run, sys.argv[2]))
"""


@pytest.fixture(autouse=True)
def clean(no_leftovers: None, tmp_path: Path) -> Iterator[None]:
    """No process and no scratch directory of the test's attempts is left."""
    yield
    assert scratches(tmp_path) == []


@pytest.fixture
def python_with_fake_ray(tmp_path: Path) -> str:
    return str(make_venv_with_fake_ray(tmp_path / "venv") / "bin" / "python")


def start_agent(
    made: MadeRun, node: int, *prefix: str, python: str = sys.executable
) -> subprocess.Popen[str]:
    """One agent of the rehearsal's attempt, by its command line."""
    attempt = made.run.latest_attempt() or made.run.new_attempt(f"l{os.getpid()}-0")
    command = [*prefix, python, "-m", "jobs.node", str(made.run.path)]
    command += ["--attempt", str(attempt.number), "--local-node", str(node)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


class Rehearsal:
    """run_local in a process of its own, as submit_grpo.py is."""

    def __init__(
        self, made: MadeRun, mode: str, python: str = sys.executable, max_requeues: int = 0
    ) -> None:
        self.made = made
        self.process = subprocess.Popen(
            [python, "-c", RUN_LOCAL, str(made.run.path), driver(mode), str(max_requeues)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for_driver(self) -> None:
        began = self.made.run.attempts / "1" / "driver_began"

        def began_or_ended() -> bool:
            return began.exists() or self.process.poll() is not None

        assert process_table.wait_for(began_or_ended, _DEADLINE_S)
        assert began.exists(), self.process.communicate()

    def finish(self) -> tuple[int, str, str]:
        """Wait for the end; returns the exit code, stdout and stderr."""
        out, err = self.process.communicate(timeout=_DEADLINE_S)
        return self.process.returncode, out, err


def run_node(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.node", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.ray
def test_a_rehearsal_is_a_ray_of_nodes_with_roles(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = make_run(tmp_path / HOSTILE, 2)
    assert run_local(made.config, made.layout, made.run, driver("ray")) == DONE
    assert "the driver sees 2 Ray nodes" in capfd.readouterr().out
    seen = json.loads((made.run.attempts / "latest" / "seen.json").read_text())
    found = {(node["address"], node["labels"]["nanoslime-role"], node["slots"]) for node in seen}
    assert found == {("127.0.1.1", "trainer", 2.0), ("127.0.1.2", "engine", 2.0)}
    assert made.end == (DONE, "")


@pytest.mark.parametrize(
    "has_real_ray", [False, pytest.param(True, marks=[pytest.mark.ray, pytest.mark.matrix])]
)
def test_a_killed_agent_ends_the_rehearsal_with_its_name(
    tmp_path: Path, python_with_fake_ray: str, has_real_ray: bool
) -> None:
    made = make_run(tmp_path, 2)
    rehearsal = Rehearsal(made, "deaf", sys.executable if has_real_ray else python_with_fake_ray)
    rehearsal.wait_for_driver()
    # Node 0 has the driver, and a daemon that the driver left behind.
    joined = json.loads((made.run.attempts / "1" / "nodes" / "0.json").read_text())
    os.kill(joined["pid"], signal.SIGKILL)
    code, _, err = rehearsal.finish()
    assert code == FAILED
    assert err.count("\n") == 1
    assert "the agent of node0 was killed by SIGKILL" in err
    assert err.rstrip().endswith("agent-0.log")
    status = made.run.status()
    _, reason = made.run.attempt(1).ended()
    assert status["phase"] == "failed" and status["error"] == reason


def test_a_rehearsal_goes_on_after_a_fault_of_a_machine_as_a_job_does(
    tmp_path: Path, python_with_fake_ray: str
) -> None:
    made = make_run(tmp_path, 1)
    rehearsal = Rehearsal(made, "until-stop", python_with_fake_ray, max_requeues=1)
    rehearsal.wait_for_driver()
    below = process_table.descendants(rehearsal.process.pid, process_table.all_processes())
    [pid] = [p.pid for p in below if "driver_program" in p.command and "--run" in p.command]
    os.kill(pid, signal.SIGKILL)
    code, out, err = rehearsal.finish()
    assert code == DONE, err
    assert "driver of attempt 2 begins" in out
    assert err.startswith("failed: the driver was killed by SIGKILL; see ")
    assert made.run.attempt(1).can_go_on()
    assert made.end == (DONE, "")


def test_a_rehearsal_ends_where_it_fails_again_without_a_commit(
    tmp_path: Path, python_with_fake_ray: str
) -> None:
    made = make_run(tmp_path, 1)
    rehearsal = Rehearsal(made, "die", python_with_fake_ray, max_requeues=1)
    code, out, err = rehearsal.finish()
    assert code == FAILED
    assert "driver of attempt 2 begins" in out
    assert err.count("failed: the driver was killed by SIGKILL") == 2
    assert made.run.latest_attempt() == made.run.attempt(2)


@pytest.mark.ray
def test_a_killed_raylet_ends_the_attempt_with_its_log(tmp_path: Path) -> None:
    made = make_run(tmp_path, 1)
    rehearsal = Rehearsal(made, "deaf")
    rehearsal.wait_for_driver()
    below = process_table.descendants(rehearsal.process.pid, process_table.all_processes())
    (raylet,) = [p for p in below if "/raylet/raylet" in p.command.split(" ")[0]]
    os.kill(raylet.pid, signal.SIGKILL)
    code, _, err = rehearsal.finish()
    assert code == FAILED
    assert "Ray on node0 ended" in err
    assert "ray-0.log" in err


def ended_with_1(made: MadeRun, *, ray_s: float) -> tuple[RunError, float]:
    """The failure of a driver that has ended, beside a Ray that ends so much later, and how many
    seconds it took to know it.
    """
    attempt = made.run.latest_attempt()
    assert attempt is not None
    commands = {"the driver": "exit 1", "Ray on n1": f"sleep {ray_s}; exit 1"}
    driver, ray = (
        ChildProcess(name, ["sh", "-c", command], {}, made.run.path / f"{name}.log")
        for name, command in commands.items()
    )
    try:
        assert process_table.wait_for(lambda: not driver.alive(), 10.0)
        begin = time.monotonic()
        return failure_of_driver(attempt, driver, [ray]), time.monotonic() - begin
    finally:
        driver.close()
        ray.close()


def test_a_driver_that_ends_with_its_ray_has_failed_by_it(tmp_path: Path) -> None:
    made = make_run(tmp_path, 1)
    made.run.new_attempt("l1-0")
    failure, _ = ended_with_1(made, ray_s=1.0)
    assert isinstance(failure, MachineFailure)
    assert str(failure).startswith("Ray on n1 ended with exit code 1")

    failure, seconds = ended_with_1(made, ray_s=60.0)
    assert not isinstance(failure, MachineFailure)
    assert str(failure).startswith("the driver ended with exit code 1")
    assert seconds < 10.0

    made.run.write_status("failed", 0, error="the reward has no module")
    failure, seconds = ended_with_1(made, ray_s=60.0)
    assert not isinstance(failure, MachineFailure)
    assert str(failure).startswith("the reward has no module; log: ")
    assert seconds < 1.0


def test_a_failing_driver_ends_with_its_last_line(
    tmp_path: Path, python_with_fake_ray: str
) -> None:
    made = make_run(tmp_path, 1)
    code, out, err = Rehearsal(made, "fail", python_with_fake_ray).finish()
    assert code == FAILED
    assert "driver of attempt 1 begins" in out
    assert "the driver ended with exit code 3" in err
    assert "driver-0.log" in err
    assert err.rstrip().endswith("error: rollout.temperature=-1 must be positive")
    with tarfile.open(made.run.attempts / "1" / "logs" / "ray-0.tar.gz") as kept:
        logged = kept.extractfile("./raylet.err")
        assert logged is not None and b"ran out of file descriptors" in logged.read()


def test_ctrl_c_lets_the_driver_commit(tmp_path: Path, python_with_fake_ray: str) -> None:
    made = make_run(tmp_path, 1)
    rehearsal = Rehearsal(made, "until-stop", python_with_fake_ray)
    rehearsal.wait_for_driver()
    rehearsal.process.send_signal(signal.SIGINT)
    code, _, err = rehearsal.finish()
    assert code == STOPPED
    assert made.end == (STOPPED, "Ctrl-C")
    assert "once more ends it at once" in err
    assert "stopped: Ctrl-C" in err


def start_guard(made: MadeRun, python: str) -> subprocess.Popen[str]:
    """The guard of a SLURM task, with the task's environment and without SLURM; its agent is on
    its way.
    """
    task = {"SLURM_JOB_ID": "71", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "n1"}
    command = [python, "-m", "jobs.node", made.run.path]
    guard = subprocess.Popen(
        [*command, "--driver", driver("until-stop")],
        cwd=ROOT,
        env={**os.environ, "PATH": "/nowhere", **task},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log = made.run.attempts / "1" / "logs" / "agent-0.log"
    assert process_table.wait_for(log.exists, _DEADLINE_S)
    return guard


def test_a_warning_that_comes_while_the_agent_starts_is_handed_on(
    tmp_path: Path, python_with_fake_ray: str
) -> None:
    made = make_run(tmp_path, 1, network_interface="lo")
    guard = start_guard(made, python_with_fake_ray)
    guard.send_signal(signal.SIGUSR2)
    said, _ = guard.communicate(timeout=_DEADLINE_S)
    code, reason = made.end
    assert (code, guard.returncode) == (STOPPED, FAILED), said
    assert reason.startswith("SIGUSR2 at n1")
    assert made.run.attempt(1).final_stop() is None


def test_sigterm_that_comes_to_all_while_the_agent_starts_is_a_stop(
    tmp_path: Path, python_with_fake_ray: str
) -> None:
    made = make_run(tmp_path, 1, network_interface="lo")
    guard = start_guard(made, python_with_fake_ray)
    children = psutil.Process(guard.pid).children
    assert process_table.wait_for(children, _DEADLINE_S)
    for process in (guard, *children()):
        process.send_signal(signal.SIGTERM)
    said, _ = guard.communicate(timeout=_DEADLINE_S)
    assert made.end == (STOPPED, "SIGTERM at n1, before the driver started"), said


def test_a_life_that_was_followed_by_another_does_not_end_the_others_step(
    tmp_path: Path, python_with_fake_ray: str
) -> None:
    """SLURM has started the job anew elsewhere while this node was thought lost. An exit code of
    this task would make its srun signal the step of the same number, which is the new life's.
    """
    made = make_run(tmp_path, 1)
    guard = start_guard(made, python_with_fake_ray)
    assert process_table.wait_for(lambda: bool(made.run.all_attempts()), _DEADLINE_S)
    newer = made.run.new_attempt("42-1")
    said, _ = guard.communicate(timeout=_DEADLINE_S)
    assert guard.returncode == DONE, said
    assert "attempt 2 of" in said and "has begun, so attempt 1 ends" in said
    assert newer.ended() is None


def test_a_second_ctrl_c_ends_a_driver_that_does_not_stop(
    tmp_path: Path, python_with_fake_ray: str
) -> None:
    made = make_run(tmp_path, 1)
    rehearsal = Rehearsal(made, "deaf", python_with_fake_ray)
    rehearsal.wait_for_driver()
    rehearsal.process.send_signal(signal.SIGINT)
    stop_file = made.run.attempts / "1" / "stop.json"
    assert process_table.wait_for(stop_file.exists, _DEADLINE_S)
    rehearsal.process.send_signal(signal.SIGINT)
    code, _, err = rehearsal.finish()
    assert code == STOPPED
    assert "stopped: Ctrl-C; the driver did not commit in time and was ended" in err


def test_a_step_that_trains_for_longer_than_a_stop_leaves_is_given_up_at_once(
    tmp_path: Path, python_with_fake_ray: str
) -> None:
    made = make_run(tmp_path, 1, signal_lead_s=100)
    rehearsal = Rehearsal(made, "long-step", python_with_fake_ray)
    rehearsal.wait_for_driver()
    rehearsal.process.send_signal(signal.SIGINT)
    code, _, err = rehearsal.finish()
    assert code == STOPPED
    given_up = r"stopped: Ctrl-C; the step in flight was given up: it had to train for (\d+) s more"
    [training_s] = re.findall(f"{given_up}, and 80 s were left", err)
    assert 80 < int(training_s) <= 100


def test_a_killed_rehearsal_takes_its_nodes_along(
    tmp_path: Path, python_with_fake_ray: str
) -> None:
    made = make_run(tmp_path, 1)
    rehearsal = Rehearsal(made, "deaf", python_with_fake_ray)
    rehearsal.wait_for_driver()
    rehearsal.process.kill()
    rehearsal.finish()
    attempt = made.run.attempts / "1"
    assert process_table.wait_for((attempt / "end.json").exists, timeout_s=20)
    assert made.end == (FAILED, "the guard of the agent of node0 was killed")
    heartbeat = attempt / "heartbeat" / "0.json"
    assert process_table.wait_for(lambda: "left" in heartbeat.read_text(), timeout_s=20)


def test_a_node_that_never_joins_is_named_within_the_deadline(
    tmp_path: Path, python_with_fake_ray: str
) -> None:
    made = make_run(tmp_path, 2, node_join_deadline_s=0.5)
    agent = start_agent(made, 0, python=python_with_fake_ray)
    out, _ = agent.communicate(timeout=_DEADLINE_S)
    code, reason = made.end
    assert code == FAILED
    assert reason.startswith("did not join within 0.5 s: node1 (node 1, ")
    assert "agent-1.log" in reason
    assert reason in out


def test_a_worker_without_a_head_gives_up_and_names_it(tmp_path: Path) -> None:
    made = make_run(tmp_path, 2, ray_start_deadline_s=0.3, node_join_deadline_s=0.2)
    agent = start_agent(made, 1)
    agent.communicate(timeout=_DEADLINE_S)
    assert agent.returncode == FAILED
    _, reason = made.end
    assert reason.startswith("waited 0.5 s for node0 to look at all nodes; see ")


def test_an_agent_pinned_to_one_core_says_so(tmp_path: Path) -> None:
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("needs two cores")
    agent = start_agent(make_run(tmp_path, 1), 0, "taskset", "-c", str(min(cores)))
    out, _ = agent.communicate(timeout=_DEADLINE_S)
    assert agent.returncode == FAILED
    assert "agent of node0 is pinned to 1 of the 2 cores" in out
    assert "--cpus-per-task=2" in out


def test_cores_that_a_machine_does_not_have_are_not_asked_for() -> None:
    check_cores(ClusterEnv.for_local(0, 1, "l0", cpus=len(os.sched_getaffinity(0))))
    check_cores(ClusterEnv.for_local(0, 1, "l0", cpus=0))


def test_a_gpu_node_whose_torch_sees_no_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(RunError, match="sees no CUDA on node0.*--target cuda"):
        check_gpus(ClusterEnv.for_local(0, 1, "l0"), needed=2)


@pytest.mark.parametrize(
    ("torch", "message"),
    [
        ("raise ImportError('no libcudart')", "does not start on node0: .*no libcudart"),
        ("version.cuda = None", "sees no CUDA on node0: it was built without CUDA"),
        ("version.cuda = '13.0'", "sees no CUDA on node0: it was built for CUDA 13.0"),
        ("cuda.is_available = lambda: True", "node0 shows 0 GPUs, the plan needs 2; check --gpus"),
    ],
)
def test_what_torch_lacks_on_a_gpu_node_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch: str, message: str
) -> None:
    """A stand-in for torch answers."""
    answers = (
        "from types import SimpleNamespace\n"
        "version = SimpleNamespace(cuda=None)\n"
        "cuda = SimpleNamespace(is_available=lambda: False, device_count=lambda: 0)\n"
    )
    (tmp_path / "torch.py").write_text(answers + torch)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RunError, match=message):
        check_gpus(ClusterEnv.for_local(0, 1, "l0"), needed=2)


def test_a_gpu_with_memory_errors_ends_the_attempt_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins for torch and nvidia-smi answer."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "torch.py").write_text(
        "from types import SimpleNamespace\n"
        "version = SimpleNamespace(cuda='13.0')\n"
        "cuda = SimpleNamespace(is_available=lambda: True, device_count=lambda: 2)\n"
    )
    smi = programs / "nvidia-smi"
    answers = (
        r"""case $1 in *rows=*) printf '0:1c.0, No, Yes\n' ;; *) printf '0, 0\n1, 12\n' ;; esac"""
    )
    smi.write_text(f"#!/bin/sh\n{answers}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", str(programs))
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    made = make_run(tmp_path / "runs", 1, device="cuda")
    agent = start_agent(made, 0)
    out, _ = agent.communicate(timeout=_DEADLINE_S)
    code, reason = made.end
    assert code == FAILED
    assert reason.startswith(
        "preflight: node0 has GPUs with broken memory (GPU 0:1c.0: remapped rows failed); "
        "its administrator"
    )
    assert "2 GPUs, driver for CUDA 0.0, torch for CUDA 13.0" in out
    assert not (made.run.attempts / "1" / "head.json").exists()


def test_an_agent_that_looks_at_its_node_beats_and_hears_signals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A torch that is long to be read stands for a shared filesystem that is slow."""
    began = tmp_path / "began"
    (tmp_path / "torch.py").write_text(
        f"import time\nopen({str(began)!r}, 'w').close()\ntime.sleep(100)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    made = make_run(tmp_path / "runs", 1, device="cuda")
    agent = start_agent(made, 0)
    assert process_table.wait_for(began.exists, _DEADLINE_S)
    attempt = made.run.attempt(1)
    assert process_table.wait_for(lambda: attempt.heartbeats()["0"]["count"] >= 2, 20.0)
    agent.send_signal(signal.SIGUSR2)
    agent.communicate(timeout=20.0)
    assert made.end == (STOPPED, "SIGUSR2 at node0, before the driver started")


def test_a_driver_that_is_too_old_is_named_in_one_sentence() -> None:
    says = "driver of n7 runs CUDA 12.2 at most, and the environment's torch needs CUDA 13.0"
    with pytest.raises(RunError, match=says):
        check_driver("n7", "13.0", 12020)
    for built_for, runs in (("13.0", 13000), ("13.2", 13000), ("12.8", 13010), (None, 12020)):
        check_driver("n7", built_for, runs)
    check_driver("n7", "13.0", 0)


def test_a_gpu_node_without_a_toolkit_gets_that_of_the_environment(tmp_path: Path) -> None:
    own = tmp_path / "lib" / "python3.12" / "site-packages" / "nvidia" / "cu13"
    assert cuda_home({}, tmp_path) == {}
    (own / "bin").mkdir(parents=True)
    nvcc = own / "bin" / "nvcc"
    nvcc.touch(mode=0o755)
    assert cuda_home({"PATH": "/nowhere"}, tmp_path) == {"CUDA_HOME": str(own)}
    assert cuda_home({"CUDA_HOME": "/opt/cuda"}, tmp_path) == {}
    assert cuda_home({"PATH": str(nvcc.parent)}, tmp_path) == {}


def test_outside_a_job_the_task_says_how_to_start_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    done = run_node(make_run(tmp_path, 1).run.path)
    assert done.returncode == FAILED
    assert done.stderr.count("\n") == 1
    assert "start this with srun" in done.stderr


def test_ports_are_below_the_ephemeral_range() -> None:
    attempt = Path("/shared/runs/run/attempts/1")
    ports = set()
    for job in range(10_000):
        ports.add(ClusterEnv.for_local(0, 1, str(job)).first_port(attempt))
    assert min(ports) >= 20_000
    assert max(ports) + 200 < 32_768
    assert len(ports) > 1000


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("n[1,3-4],m7", ["n1", "n3", "n4", "m7"]),
        ("gpu-[08-10]", ["gpu-08", "gpu-09", "gpu-10"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
        ("a[1-2]-ib,b", ["a1-ib", "a2-ib", "b"]),
    ],
)
def test_node_lists_expand_without_scontrol(
    monkeypatch: pytest.MonkeyPatch, text: str, names: list[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    environ = {"SLURM_JOB_ID": "71", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": text}
    assert ClusterEnv.from_slurm(environ, "lo").node_names == tuple(names)


def test_slurm_facts_of_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    # A PATH without scontrol.
    monkeypatch.setenv("PATH", "/nowhere")
    environ = {
        "SLURM_JOB_ID": "71",
        "SLURM_NODEID": "1",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_RESTART_COUNT": "3",
        "SLURM_CPUS_PER_TASK": "16",
        "SLURM_CPUS_ON_NODE": "64",
    }
    env = ClusterEnv.from_slurm(environ, "lo")
    assert env.node_name == "n2"
    assert env.node_names == ("n1", "n2")
    assert env.num_nodes == 2
    assert env.address == "127.0.0.1"
    assert env.cpus == 16
    assert env.attempt_key == "71-3"


@pytest.mark.parametrize(
    ("environ", "chosen"),
    [
        ({"SLURM_TMPDIR": "own/job", "TMPDIR": "own"}, "own/job"),
        ({"SLURM_TMPDIR": "far/" + "x" * 30, "TMPDIR": "own"}, "own"),
        ({"TMPDIR": "not/there"}, "/tmp"),
        ({"TMPDIR": ""}, "/tmp"),
        ({}, "/tmp"),
    ],
)
def test_scratch_lies_in_the_jobs_own_directory_where_names_of_sockets_fit(
    environ: dict[str, str], chosen: str
) -> None:
    with TemporaryDirectory(dir="/tmp", prefix="s") as short:
        for folder in ("own/job", "far/" + "x" * 30):
            (Path(short) / folder).mkdir(parents=True)
        given = {name: value and f"{short}/{value}" for name, value in environ.items()}
        root = scratch_root(given)
        assert root == Path(short) / chosen
        env = replace(ClusterEnv.for_local(127, 200, "12345678"), scratch_root=root)
        session = "ray/session_2026-11-28_20-53-38_123456_4194304/sockets/plasma_store"
        assert len(str(env.scratch(Path("/shared/runs") / ("x" * 200)) / session)) <= 107


def test_a_sites_own_scratch_is_made_and_one_that_is_too_long_is_refused(tmp_path: Path) -> None:
    assert scratch_root({"TMPDIR": "/tmp"}, str(tmp_path / "site")).is_dir()
    with pytest.raises(ValueError, match=r"scratch='/local/.*' has more than the 23 bytes"):
        ClusterConfig(scratch="/local/scratch/of/somebody")


def test_of_several_interfaces_the_first_one_has_the_address() -> None:
    environ = {"SLURM_JOB_ID": "71", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "n1"}
    assert ClusterEnv.from_slurm(environ, "lo,ib0").address == "127.0.0.1"


def test_an_unknown_interface_lists_those_that_exist() -> None:
    with pytest.raises(RunError, match=r"network_interface=ib9 .*there: .*lo"):
        interface_address("ib9")


def test_open_run_is_required(tmp_path: Path) -> None:
    done = run_node(tmp_path, "--attempt", "1")
    assert done.returncode == FAILED
    assert "is not a run directory" in done.stderr
    with pytest.raises(RunError):
        RunDir.open(tmp_path)


def test_jobs_run_with_the_hugging_face_libraries_offline(tmp_path: Path) -> None:
    base = {"HF_HUB_OFFLINE": "0", "RAY_AUTH_TOKEN": "another"}
    env = ray_node.environment(base, tmp_path / "token", tmp_path)
    assert "RAY_AUTH_TOKEN" not in env
    assert env["HF_HUB_OFFLINE"] == "1"
    assert env["TRANSFORMERS_OFFLINE"] == "1"
    assert env["RAY_AUTH_MODE"] == "token"
    # The soak has seen Ray's head grow by what it keeps of every call.
    assert env["RAY_task_events_report_interval_ms"] == "0"


def test_what_ray_starts_is_not_niced_unless_the_user_says_so(tmp_path: Path) -> None:
    env = ray_node.environment({}, tmp_path / "token", tmp_path)
    assert env["RAY_worker_niceness"] == "0"
    env = ray_node.environment({"RAY_worker_niceness": "5"}, tmp_path / "token", tmp_path)
    assert env["RAY_worker_niceness"] == "5"


def make_agent(made: MadeRun, node: int, attempt: Attempt) -> Agent:
    num_nodes = made.layout.num_nodes
    env = ClusterEnv.for_local(node, num_nodes, f"l{os.getpid()}")
    return Agent(attempt, made.config, made.layout, env, "")


@pytest.mark.parametrize("num_nodes", [4, 64])
def test_all_agents_together_read_each_heartbeat_twice_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_nodes: int
) -> None:
    made = make_run(tmp_path, num_nodes)
    attempt = made.run.new_attempt()
    agents = [make_agent(made, node, attempt) for node in range(num_nodes)]
    for node in range(num_nodes):
        attempt.beat(node, 1)
    opened: list[Path] = []
    read_bytes = Path.read_bytes

    def counted(path: Path) -> bytes:
        opened.append(path)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    for agent in agents:
        agent._check_heartbeats()
    assert num_nodes <= len(opened) < 2 * num_nodes


@dataclass
class Clock:
    """The time that agents see."""

    now: float = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    ours = Clock()
    monkeypatch.setattr(agent_module.time, "monotonic", lambda: ours.now)
    return ours


@pytest.mark.parametrize("node", [0, 1])
def test_a_heartbeat_that_stays_unreadable_is_one_that_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock, node: int
) -> None:
    """The fault of a file server is injected at the read."""
    made = make_run(tmp_path, 2)
    attempt = made.run.new_attempt()
    agent = make_agent(made, node, attempt)
    attempt.beat(0, 1)
    attempt.beat(1, 1)
    agent._check_heartbeats()

    def stale(path: Path) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", stale)
    clock.now = 89.0
    agent._check_heartbeats()
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    attempt.beat(0, 2)
    attempt.beat(1, 2)
    agent._check_heartbeats()
    monkeypatch.setattr(Path, "read_bytes", stale)
    clock.now = 178.0
    agent._check_heartbeats()
    clock.now = 180.0
    with pytest.raises(RunError, match=r"no heartbeat from node[01] .* for 90 s; see .*agent-"):
        agent._check_heartbeats()


def test_a_node_whose_beats_are_regular_is_lost_sooner(tmp_path: Path, clock: Clock) -> None:
    made = make_run(tmp_path, 4)
    attempt = made.run.new_attempt()
    agent = make_agent(made, 0, attempt)
    for count in range(1, 6):
        attempt.beat(1, count)
        agent._check_heartbeats()
        clock.now += 5.0
    clock.now += 34.0
    agent._check_heartbeats()
    clock.now += 2.0
    with pytest.raises(MachineFailure, match=r"no heartbeat from node1 .* for 40 s; see .*agent-"):
        agent._check_heartbeats()
    assert (attempt.path / "stacks").exists()
    assert attempt.lost(1).exists()


def test_a_silent_engine_node_is_lost_and_the_attempt_goes_on_until_it_is_back(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """What the node has said of a hang counts no more."""
    made = make_run(tmp_path, 4)
    attempt = made.run.new_attempt()
    agent = make_agent(made, 0, attempt)

    def beats(count: int, *nodes: int) -> None:
        for node in nodes:
            attempt.beat(node, count, findings=[(2, 1000.0, "late")] if node == 3 else ())
        agent._check_heartbeats()

    beats(1, 0, 1, 2, 3)
    for count in range(2, 20):
        clock.now += 30.0
        beats(count, 0, 1, 2)
    assert attempt.lost(3).exists() and not attempt.lost(2).exists()
    assert caplog.text.count("no heartbeat from node3 (node 3) for 90 s: the run goes on") == 1
    other = make_agent(made, 3, attempt)
    with pytest.raises(AttemptOver) as over:
        other._tick()
    assert (over.value.code, over.value.published) == (DONE, True)
    # Its guard starts another agent, whose beats count from one again.
    attempt.lost(3).unlink()
    attempt.beat(3, 1)
    for count in range(20, 24):
        clock.now += 5.0
        attempt.beat(3, count)
        agent._check_heartbeats()
    assert attempt.ended() is None
    assert max(agent._beat_intervals) < 100 and min(agent._beat_intervals) >= 0
    clock.now += 91.0
    beats(30, 0, 1, 2)
    assert attempt.lost(3).exists(), "it may be lost again"


def test_an_attempt_ended_by_another_keeps_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two agents find the same death: one of them ends the attempt, the other follows."""
    # They would end the servers of other tests.
    monkeypatch.setattr(agent_module, "end_descendants", lambda **_: None)
    made = make_run(tmp_path, 2)
    attempt = made.run.new_attempt()
    agents = [make_agent(made, node, attempt) for node in range(2)]
    attempt.leave(0)
    attempt.leave(1)
    first = AttemptOver(FAILED, "Ray on node1 ended")
    second = AttemptOver(STOPPED, "Ray on node0 ended")
    assert [agents[1]._leave(first), agents[0]._leave(second)] == [FAILED, FAILED]
    assert attempt.ended() == (FAILED, "Ray on node1 ended")


@pytest.mark.parametrize("node", [0, 1])
def test_an_agent_ends_when_a_newer_attempt_has_begun_and_leaves_that_ones_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node: int
) -> None:
    monkeypatch.setattr(agent_module, "end_descendants", lambda **_: None)
    made = make_run(tmp_path, 2)
    attempt = made.run.new_attempt("42-0")
    agent = make_agent(made, node, attempt)
    agent._tick()
    made.run.new_attempt("42-1")
    made.run.write_status("generate", 3)
    agent._next_beat_at = 0.0
    with pytest.raises(RunError, match="attempt 2 of .* has begun, so attempt 1 ends") as error:
        agent._tick()
    for other in range(2):
        attempt.leave(other)
    assert agent._leave(AttemptOver(FAILED, str(error.value))) == FAILED
    assert attempt.ended() == (FAILED, str(error.value))
    assert made.run.status()["phase"] == "generate"


def test_the_code_of_an_attempt_outlives_a_directory_that_cannot_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault of a file server is injected at the listing of heartbeats."""
    monkeypatch.setattr(agent_module, "end_descendants", lambda **_: None)
    made = make_run(tmp_path, 2)
    attempt = made.run.new_attempt()

    def stale(attempt: Attempt, nodes: object = None) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(attempt.path))

    monkeypatch.setattr(Attempt, "heartbeats", stale)
    assert make_agent(made, 0, attempt)._leave(AttemptOver(STOPPED, "SIGUSR2")) == STOPPED
    assert attempt.ended() == (STOPPED, "SIGUSR2")


def test_a_signal_that_cannot_be_passed_on_is_passed_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault of a file server is injected at the write of one request."""
    made = make_run(tmp_path, 2)
    attempt = made.run.new_attempt()
    agent = make_agent(made, 0, attempt)
    agent._signals.append(signal.SIGUSR2)

    def stale(path: Path, data: bytes) -> bool:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    with monkeypatch.context() as patch:
        patch.setattr("nanoslime.run_dir.publish_once", stale)
        agent._pass_on_signals()
    assert attempt.must_stop() is None
    agent._pass_on_signals()
    assert attempt.must_stop() == "SIGUSR2 at node0"
    assert attempt.final_stop() is None
    assert not agent._signals


@pytest.mark.matrix
def test_links_slower_than_the_site_expects_end_the_attempt_before_ray_starts(
    tmp_path: Path, python_with_fake_ray: str
) -> None:
    """Of two nodes nobody knows which one it is."""
    made = make_run(tmp_path, 2, measure_links=True, expected_gbps=5000.0)
    code, _, err = Rehearsal(made, "deaf", python_with_fake_ray).finish()
    assert code == FAILED
    says = r"failed: preflight: node0 exchanges [\d.]+ GB/s with node1 through lo, less than half"
    assert re.match(says, err), err
    attempt = made.run.attempt(1)
    assert not attempt.head.exists()
    assert re.search(r"links +UNFIT", (attempt.path / "preflight.txt").read_text())
