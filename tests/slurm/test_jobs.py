"""Submission, supervision and requeue on a real SLURM and Ray, with a stand-in for the trainer."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.cluster_env import preemption_grace_s
from nanoslime.run_dir import DONE, FAILED, STOPPED
from nanoslime.storage.shared_files import read_json
from nanoslime.types import RunError
from tests import process_table
from tests.jobs.made_run import (
    HOSTILE,
    MadeRun,
    driver,
    make_run,
    make_venv_with_fake_ray,
    scratches,
)
from tests.slurm.cluster import SlurmCluster
from tools.submit import grpo as submit_grpo
from tools.submit.slurm_submit import submit_sbatch, submit_submitit

pytestmark = [pytest.mark.slurm, pytest.mark.ray]
_DEADLINE_S = 150.0


@pytest.fixture
def slurm(
    slurm_cluster: SlurmCluster, no_leftovers: None, monkeypatch: pytest.MonkeyPatch
) -> SlurmCluster:
    """The cluster as a user's shell sees it. After the test nothing of its jobs may be left."""
    monkeypatch.setenv("SLURM_CONF", str(slurm_cluster.config_file))
    return slurm_cluster


def logs(made: MadeRun) -> str:
    files = sorted(file for file in made.run.path.rglob("*") if file.suffix in (".log", ".out"))
    return "\n".join(f"--- {file}\n{file.read_text(errors='replace')[-2000:]}" for file in files)


def wait_for_driver(made: MadeRun, attempt: int) -> None:
    began = made.run.attempts / str(attempt) / "driver_began"
    ended = made.run.attempts / str(attempt) / "end.json"

    def began_or_ended() -> bool:
        return began.exists() or ended.exists()

    assert process_table.wait_for(began_or_ended, _DEADLINE_S), logs(made)
    assert began.exists(), logs(made)


def test_submitit_job_has_an_agent_per_node_and_roles_where_the_plan_says(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    made = make_run(tmp_path / HOSTILE, 4)
    job_id = submit_submitit(made.config, made.layout, made.run, driver("ray"))
    slurm.wait_state(int(job_id), "COMPLETED", timeout_s=_DEADLINE_S)

    assert made.end == (DONE, "")
    seen = json.loads((made.run.attempts / "1" / "seen.json").read_text())
    found = {}
    for node in seen:
        labels = node["labels"]
        found[labels["nanoslime-node"]] = (labels["nanoslime-role"], node["address"])
    assert found == {
        "0": ("trainer", "127.0.1.1"),
        "1": ("trainer", "127.0.1.2"),
        "2": ("engine", "127.0.1.3"),
        "3": ("engine", "127.0.1.4"),
    }
    assert {node["slots"] for node in seen} == {2.0}
    attempt = made.run.attempts / "1"
    joined = [json.loads((attempt / "nodes" / f"{node}.json").read_text()) for node in range(4)]
    assert [node["name"] for node in joined] == slurm.node_names
    assert (attempt / "ray_token").stat().st_mode & 0o777 == 0o600
    assert (made.run.path / "slurm").stat().st_mode & 0o777 == 0o700
    assert scratches(tmp_path) == []


@pytest.mark.parametrize(
    ("submit", "has_ray"),
    [(submit_submitit, True), (submit_sbatch, False)],
    ids=["submitit-ray", "sbatch-fake_ray"],
)
def test_a_job_told_that_its_time_is_up_commits_requeues_and_goes_on(
    slurm: SlurmCluster, tmp_path: Path, submit: Callable[..., str], has_ray: bool
) -> None:
    venv = "" if has_ray else str(make_venv_with_fake_ray(tmp_path / "venv"))
    made = make_run(tmp_path / HOSTILE, 2, venv=venv)
    job_id = submit(made.config, made.layout, made.run, driver("until-stop"))
    wait_for_driver(made, 1)
    slurm.run("scancel", "--signal=USR2", job_id)
    wait_for_driver(made, 2)
    slurm.wait_state(int(job_id), "COMPLETED", timeout_s=_DEADLINE_S)

    first = made.run.attempt(1)
    second = made.run.attempt(2)
    code, reason = first.ended() or (None, "")
    assert code == STOPPED, logs(made)
    assert reason.startswith("SIGUSR2 at n"), logs(made)
    assert second.ended() == (DONE, "")
    assert first.key == f"{job_id}-0"
    assert second.key == f"{job_id}-1"
    assert slurm.job(int(job_id))["Restarts"] == "1"
    assert scratches(tmp_path) == []


def test_a_killed_agent_fails_the_job_in_one_line_and_leaves_nothing(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    made = make_run(tmp_path, 2, max_requeues=0)
    job_id = submit_sbatch(made.config, made.layout, made.run, driver("deaf"))
    wait_for_driver(made, 1)
    agent = json.loads((made.run.attempts / "1" / "nodes" / "1.json").read_text())
    os.kill(agent["pid"], signal.SIGKILL)
    slurm.wait_state(int(job_id), "FAILED", timeout_s=60)

    code, reason = made.end
    assert code == FAILED
    assert "the agent of n2 was killed by SIGKILL" in reason
    assert "agent-1.log" in reason
    status = made.run.status()
    assert status["phase"] == "failed"
    assert status["error"] == reason
    assert scratches(tmp_path) == []


@pytest.mark.parametrize("submit", [submit_submitit, submit_sbatch])
def test_a_job_that_is_cancelled_while_it_drains_leaves_nothing_and_never_comes_back(
    slurm: SlurmCluster, tmp_path: Path, submit: Callable[..., str]
) -> None:
    venv = str(make_venv_with_fake_ray(tmp_path / "venv"))
    made = make_run(tmp_path, 1, venv=venv)
    job_id = submit(made.config, made.layout, made.run, driver("deaf"))
    wait_for_driver(made, 1)
    slurm.run("scancel", "--signal=USR2", job_id)
    stop = made.run.attempts / "1" / "stop.json"
    assert process_table.wait_for(stop.exists, timeout_s=15), logs(made)
    slurm.run("scancel", job_id)
    fields = slurm.wait_state(int(job_id), "CANCELLED", timeout_s=30)
    assert process_table.wait_for(lambda: not scratches(tmp_path), timeout_s=15)
    assert fields["Restarts"] == "0"
    assert fields["EndTime"] != "Unknown"
    code, reason = made.end
    assert code == STOPPED
    assert reason.startswith("SIGTERM at n1")


@pytest.mark.parametrize("submit", [submit_submitit, submit_sbatch])
def test_a_run_that_is_told_to_end_early_fails_its_job(
    slurm: SlurmCluster, tmp_path: Path, submit: Callable[..., str]
) -> None:
    """`scancel --signal=TERM` alone: SLURM would call an exit code of 0 COMPLETED."""
    venv = str(make_venv_with_fake_ray(tmp_path / "venv"))
    made = make_run(tmp_path, 1, venv=venv)
    job_id = submit(made.config, made.layout, made.run, driver("until-stop"))
    wait_for_driver(made, 1)
    slurm.run("scancel", "--signal=TERM", job_id)
    fields = slurm.wait_state(int(job_id), "FAILED", timeout_s=60)
    assert fields["Restarts"] == "0"
    assert made.end == (STOPPED, "SIGTERM at n1")
    assert "not requeued: the run was asked to end: SIGTERM at n1" in logs(made)


@pytest.mark.parametrize(
    ("victim", "says"),
    [
        (r"driver_program\.py deaf --run", "the driver was killed by SIGKILL"),
        pytest.param(r"fake_ray\.py start", "Ray on n[12] was killed by", marks=pytest.mark.matrix),
        pytest.param(
            r"jobs\.node \S+ --attempt", "the agent of n[12] was killed", marks=pytest.mark.matrix
        ),
        pytest.param(
            r"jobs\.node \S+ --driver",
            "the guard of the agent of n[12] was",
            marks=pytest.mark.matrix,
        ),
    ],
    ids=["driver", "ray", "agent", "guard"],
)
def test_a_job_whose_process_was_killed_goes_on_by_itself(
    slurm: SlurmCluster, tmp_path: Path, victim: str, says: str
) -> None:
    venv = str(make_venv_with_fake_ray(tmp_path / "venv"))
    made = make_run(tmp_path, 2, venv=venv)
    job_id = submit_sbatch(made.config, made.layout, made.run, driver("deaf"))
    wait_for_driver(made, 1)
    running = process_table.all_processes().values()
    own = [p for p in running if str(tmp_path) in p.command and not p.command.startswith("srun")]
    pid = next(p.pid for p in own if re.search(victim, p.command))
    os.kill(pid, signal.SIGKILL)
    slurm.wait_state(int(job_id), "COMPLETED", timeout_s=_DEADLINE_S)
    assert made.run.attempt(2).ended() == (DONE, ""), logs(made)
    code, reason = made.run.attempt(1).ended() or (FAILED, "")
    assert re.search(says, reason), reason
    assert "requeued (1 of 10 in a row without a new commit)" in logs(made)
    assert scratches(tmp_path) == []


@pytest.mark.matrix
def test_a_job_that_its_time_limit_ends_before_it_has_drained_goes_on(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    """It is told at once that its time is up, and does not stop."""
    venv = str(make_venv_with_fake_ray(tmp_path / "venv"))
    made = make_run(tmp_path, 1, venv=venv, time_limit_min=1, signal_lead_s=300)
    job_id = submit_submitit(made.config, made.layout, made.run, driver("deaf"))
    wait_for_driver(made, 2)
    slurm.wait_state(int(job_id), "COMPLETED", timeout_s=_DEADLINE_S)
    first = made.run.attempt(1)
    code, reason = first.ended() or (FAILED, "")
    assert code == STOPPED
    assert (first.final_stop() or "").startswith("SIGTERM")
    assert "requeued (1 of 10 in a row without a new commit)" in logs(made)


@pytest.mark.matrix
@pytest.mark.parametrize("grace_s", [0, 30])
def test_a_job_that_is_preempted_stops_and_is_requeued_once(
    slurm: SlurmCluster, tmp_path: Path, grace_s: int
) -> None:
    """SLURM requeues it by itself where its partition has no grace time."""
    venv = str(make_venv_with_fake_ray(tmp_path / "venv"))
    made = make_run(tmp_path, 1, venv=venv)
    slurm.run("scontrol", "update", "partitionname=main", f"GraceTime={grace_s}")
    try:
        assert preemption_grace_s("main") == preemption_grace_s() == grace_s
        job_id = submit_sbatch(made.config, made.layout, made.run, driver("until-stop"))
        wait_for_driver(made, 1)
        options = ["--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null"]
        slurm.sbatch(*options, "--wrap=sleep 1")
        wait_for_driver(made, 2)
        fields = slurm.wait_state(int(job_id), "COMPLETED", timeout_s=_DEADLINE_S)
    finally:
        slurm.run("scontrol", "update", "partitionname=main", "GraceTime=0")
    code, reason = made.run.attempt(1).ended() or (FAILED, "")
    # SLURM sends it to the driver too, which would not live to commit.
    assert (code, reason) == (STOPPED, "SIGTERM at n1")
    assert fields["Restarts"] == "1"


def start_with_regular_beats(
    slurm: SlurmCluster, tmp_path: Path, resume_by: str = "requeue"
) -> tuple[MadeRun, str]:
    """A job of four nodes, two of them with engines, that misses a node after 15 s."""
    venv = str(make_venv_with_fake_ray(tmp_path / "venv"))
    made = make_run(tmp_path, 4, venv=venv, hang_factor=3.0, resume_by=resume_by)
    job_id = submit_sbatch(made.config, made.layout, made.run, driver("until-told"))
    wait_for_driver(made, 1)
    attempt = made.run.attempt(1)

    def are_regular() -> bool:
        beats = attempt.heartbeats()
        return len(beats) == 4 and all(beat.get("count", 0) >= 4 for beat in beats.values())

    assert process_table.wait_for(are_regular, 60), logs(made)
    return made, job_id


@pytest.mark.matrix
@pytest.mark.parametrize("loss", ["power", "power, and SLURM does not notice", "set down"])
def test_a_run_goes_on_without_an_engine_node(
    slurm: SlurmCluster, tmp_path: Path, loss: str, request: pytest.FixtureRequest
) -> None:
    """A node that is set down while its slurmd answers loses its task at once."""
    is_noticed = loss != "power, and SLURM does not notice"
    if not is_noticed:
        request.getfixturevalue("patient_slurm")
    made, job_id = start_with_regular_beats(slurm, tmp_path)
    attempt = made.run.attempt(1)
    if loss == "set down":
        slurm.run("scontrol", "update", "nodename=n4", "state=down", "reason=lost")
    else:
        slurm.kill_node("n4")
    assert process_table.wait_for(attempt.lost(3).exists, 45), logs(made)

    def node_is_gone() -> bool:
        return slurm.job(int(job_id))["NodeList"] == "n[1-3]"

    if is_noticed:
        assert process_table.wait_for(node_is_gone, 60), slurm.log_tails()
    beats = {node: attempt.heartbeats()[node]["count"] for node in "012"}

    def all_live() -> bool:
        now = attempt.heartbeats()
        return all(now[node]["count"] > beats[node] + 1 for node in "012")

    assert process_table.wait_for(all_live, 60), logs(made)
    assert node_is_gone() == is_noticed
    (attempt.path / "finish").touch()
    if not is_noticed:
        # SLURM would have it so until it misses the node.
        slurm.wait_state(int(job_id), "COMPLETING", timeout_s=60)
        slurm.start_dead_nodes()
    fields = slurm.wait_state(int(job_id), "COMPLETED", timeout_s=60)
    if not is_noticed:
        slurm.kill_node("n4")
    assert attempt.ended() == (DONE, ""), logs(made)
    assert fields["Restarts"] == "0"
    assert "the step is ended without n4" in logs(made)


@pytest.mark.matrix
def test_an_attempt_that_loses_a_trainer_node_is_followed_by_one_on_the_others(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    made, job_id = start_with_regular_beats(slurm, tmp_path)
    slurm.kill_node("n2")
    fields = slurm.wait_state(int(job_id), "COMPLETED", timeout_s=_DEADLINE_S)
    code, reason = made.run.attempt(1).ended() or (DONE, "")
    assert code == FAILED
    assert "no heartbeat from n2" in reason
    second = made.run.attempt(2)
    assert second.ended() == (DONE, ""), logs(made)
    assert second.layout == made.layout.on(3)
    joined = [json.loads((second.path / "nodes" / f"{i}.json").read_text()) for i in range(3)]
    assert [node["name"] for node in joined] == ["n1", "n3", "n4"]
    assert "goes on without the lost nodes, on n1, n3, n4 (1 of 10 in a row" in logs(made)
    assert fields["Restarts"] == "0"


@pytest.mark.matrix
def test_a_job_whose_batch_script_is_lost_with_its_node_is_requeued(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    """By us, or by SLURM itself where that notices the loss first."""
    made, job_id = start_with_regular_beats(slurm, tmp_path)
    slurm.kill_node("n1")
    slurm.wait_state(int(job_id), "PENDING", timeout_s=90)
    slurm.start_dead_nodes()
    fields = slurm.wait_state(int(job_id), "COMPLETED", timeout_s=60)
    slurm.kill_node("n1")
    assert made.run.attempt(2).ended() == (DONE, ""), logs(made)
    assert fields["Restarts"] == "1"


@pytest.fixture
def patient_slurm(slurm: SlurmCluster) -> Iterator[SlurmCluster]:
    """It misses a node as late as SLURM does where nobody has set it up otherwise."""
    before = slurm.config_file.read_text()
    slurm.config_file.write_text(before.replace("SlurmdTimeout=10", "SlurmdTimeout=300"))
    slurm.run("scontrol", "reconfigure")
    yield slurm
    slurm.config_file.write_text(before)
    slurm.run("scontrol", "reconfigure")


@pytest.mark.matrix
@pytest.mark.parametrize("resume_by", ["requeue", "chain"])
def test_a_job_without_its_batch_script_goes_on_long_before_slurm_misses_the_node(
    patient_slurm: SlurmCluster, tmp_path: Path, resume_by: str
) -> None:
    made, job_id = start_with_regular_beats(patient_slurm, tmp_path, resume_by=resume_by)
    patient_slurm.kill_node("n1")
    first = made.run.attempt(1)
    assert process_table.wait_for(lambda: first.ended() is not None, 45), logs(made)
    code, reason = first.ended() or (DONE, "")
    assert code == FAILED
    assert "no heartbeat from n1" in reason

    def goes_on() -> bool:
        holder = read_json(made.run.job)["job_id"]
        return holder != job_id or patient_slurm.job(int(job_id))["Restarts"] == "1"

    assert process_table.wait_for(goes_on, 45), logs(made)
    patient_slurm.start_dead_nodes()
    holder = read_json(made.run.job)["job_id"]
    assert (holder == job_id) == (resume_by == "requeue")
    patient_slurm.wait_state(int(holder), "COMPLETED", timeout_s=120)
    patient_slurm.kill_node("n1")
    assert made.run.attempt(2).ended() == (DONE, ""), logs(made)


@pytest.mark.matrix
def test_an_engine_node_that_was_only_silent_joins_again(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    made, job_id = start_with_regular_beats(slurm, tmp_path)
    attempt = made.run.attempt(1)
    found = process_table.all_processes()
    guard = next(
        process
        for process in found.values()
        if process.has_env("SLURMD_NODENAME", "n4") and "jobs.node" in process.command
        if "--attempt" not in process.command and str(made.run.path) in process.command
    )
    node = [guard, *process_table.descendants(guard.pid, found)]
    for process in node:
        os.kill(process.pid, signal.SIGSTOP)
    assert process_table.wait_for(attempt.lost(3).exists, 45), logs(made)
    first = json.loads((attempt.path / "nodes" / "3.json").read_text())["pid"]
    for process in node:
        os.kill(process.pid, signal.SIGCONT)

    def has_joined_again() -> bool:
        return json.loads((attempt.path / "nodes" / "3.json").read_text())["pid"] != first

    assert process_table.wait_for(has_joined_again, 60), logs(made)
    assert not attempt.lost(3).exists()
    (attempt.path / "finish").touch()
    slurm.wait_state(int(job_id), "COMPLETED", timeout_s=60)
    assert attempt.ended() == (DONE, "")
    assert scratches(tmp_path) == []


@pytest.mark.matrix
@pytest.mark.parametrize("mode", ["until-stop", "deaf"])
def test_a_job_that_may_not_be_requeued_goes_on_in_another_one_when_its_time_is_up(
    slurm: SlurmCluster, tmp_path: Path, mode: str
) -> None:
    """Whether it has drained or not."""
    venv = str(make_venv_with_fake_ray(tmp_path / "venv"))
    times = {"time_limit_min": 1, "signal_lead_s": 30}
    made = make_run(tmp_path, 1, venv=venv, resume_by="chain", **times)
    job_id = submit_sbatch(made.config, made.layout, made.run, driver(mode))
    wait_for_driver(made, 2)
    record = read_json(made.run.job)
    assert record["jobs"] == [job_id, record["job_id"]]
    slurm.wait_state(int(record["job_id"]), "COMPLETED", timeout_s=60)
    assert slurm.job(int(job_id))["Requeue"] == "0"
    assert made.run.attempt(2).key == f"{record['job_id']}-0"
    assert made.run.attempt(2).ended() == (DONE, "")
    told = (
        rf"attempt 1 ended: SIGUSR2 at n1.*; goes on in job {record['job_id']} \(1 of 10 in a row"
    )
    assert re.search(told, logs(made)), logs(made)


@pytest.mark.matrix
def test_a_job_that_slurm_starts_anew_is_left_by_its_earlier_processes(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    """slurmd of the node dies, what it ran lives on, and SLURM requeues the job."""
    venv = str(make_venv_with_fake_ray(tmp_path / "venv"))
    made = make_run(tmp_path, 1, venv=venv)
    job_id = submit_sbatch(made.config, made.layout, made.run, driver("deaf"))
    wait_for_driver(made, 1)
    daemon = slurm.daemons.pop("slurmd-n1")
    daemon.kill()
    daemon.wait()
    slurm.run("scontrol", "update", "nodename=n1", "state=down", "reason=lost")
    wait_for_driver(made, 2)
    first = made.run.attempt(1)
    assert process_table.wait_for(lambda: first.ended() is not None, timeout_s=10), logs(made)
    code, reason = first.ended() or (DONE, "")
    assert code == FAILED
    assert reason.startswith("attempt 2 of ")
    assert "so attempt 1 ends and commits nothing more" in reason
    fields = slurm.wait_state(int(job_id), "COMPLETED", timeout_s=60)
    assert fields["Restarts"] == "1"


def test_sbatch_refusing_is_one_line(slurm: SlurmCluster, tmp_path: Path) -> None:
    made = make_run(tmp_path, 1, partition="nowhere")
    refusal = "sbatch refused the job: .*invalid partition specified: nowhere"
    for submit in (submit_submitit, submit_sbatch):
        with pytest.raises(RunError, match=refusal) as error:
            submit(made.config, made.layout, made.run)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("submitter", ["submitit", "sbatch"])
def test_what_slurm_refuses_leaves_nothing_and_a_resumed_run_as_it_was(
    slurm: SlurmCluster, tmp_path: Path, submitter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    later = tmp_path / "later.yaml"
    later.write_text("{gpus_per_node: 0, extra_sbatch: {begin: now+1hour}}")
    flags = ["--nodes", "1", "--cluster", str(later), "--submit", submitter]
    flags += ["--run-root", str(runs), "--name", "mine"]
    for _ in range(2):
        assert submit_grpo.main([*flags, "--constraint", "nowhere"]) == 2
        assert "Invalid feature specification" in capsys.readouterr().err
        assert not runs.exists()

    assert submit_grpo.main(flags) == 0, capsys.readouterr().err
    run = runs / "mine"
    assert list(runs.iterdir()) == [run]
    before = {path: path.read_bytes() for path in run.rglob("[!.]*") if path.is_file()}
    assert submit_grpo.main(["--resume", str(run)]) == 2
    (job_id,) = slurm.run("squeue", "--noheader", "--format=%A").stdout.split()
    assert f"job {job_id} still holds {run}: it is PENDING (BeginTime)" in capsys.readouterr().err
    slurm.run("scancel", job_id)
    slurm.wait_state(int(job_id), "CANCELLED", timeout_s=10)
    assert submit_grpo.main(["--resume", str(run), "--constraint", "nowhere", "--lr", "1"]) == 2
    assert "Invalid feature specification" in capsys.readouterr().err
    after = {path: path.read_bytes() for path in run.rglob("[!.]*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize("submitter", ["submitit", "sbatch"])
def test_the_script_that_is_shown_is_the_one_that_is_submitted(
    slurm: SlurmCluster,
    tmp_path: Path,
    submitter: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    comment = 'it\'s a; "$HOME" `x` #no %j'
    site = {"gpus_per_node": 0, "comment": comment, "extra_sbatch": {"hold": ""}, "exclude": "n2"}
    Path("site.yaml").write_text(json.dumps(site))
    flags = ["--nodes", "1", "--cluster", "site.yaml", "--submit", submitter]
    flags += ["--run-root", "my 'runs'"]
    for _ in range(2):  # the second run gets another name
        assert submit_grpo.main([*flags, "--print-sbatch"]) == 0
        printed = capsys.readouterr().out
        assert submit_grpo.main([*flags, "--dry-run"]) == 0
        assert capsys.readouterr().out.endswith(f"--- batch script\n{printed}")
        assert submit_grpo.main(flags) == 0
        job_id = re.findall("submitted job ([0-9]+)", capsys.readouterr().out)[0]
        slurm.run("scontrol", "write", "batch_script", job_id, "submitted")
        assert Path("submitted").read_text() == printed
        shown = slurm.run("scontrol", "show", "job", job_id).stdout
        assert f"Comment={comment}" in shown
        assert "ExcNodeList=n2" in shown
        slurm.run("scancel", job_id)
    assert sorted(os.listdir("my 'runs'")) == ["rehearsal", "rehearsal-2"]


# Stand-ins that note their words and run the command behind them: an `apptainer`, and an `srun`
# with the options of pyxis, which the real one has only where its plugin is installed.
APPTAINER = """#!/bin/bash
printf '%s\\n' "$*" >> {calls}
while [[ "$1" != *.sif ]]; do shift; done
IN_IMAGE="$1" exec "${{@:2}}"
"""
PYXIS = """#!/bin/bash
words=()
for word in "$@"; do
    case "$word" in
        --container-*) printf '%s ' "$word" >> {calls} ;;
        *) words+=("$word") ;;
    esac
done
IN_IMAGE=pyxis exec {srun} "${{words[@]}}"
"""


@pytest.mark.parametrize(("kind", "program"), [("apptainer", APPTAINER), ("pyxis", PYXIS)])
def test_agents_run_in_a_container_and_what_follows_them_does_not(
    slurm: SlurmCluster,
    tmp_path: Path,
    kind: str,
    program: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    calls = tmp_path / "calls"
    stand_in = programs / ("srun" if kind == "pyxis" else kind)
    stand_in.write_text(program.format(calls=calls, srun=shutil.which("srun")))
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    venv = str(make_venv_with_fake_ray(tmp_path / "venv"))
    image = {"container": kind, "container_image": "x.sif", "container_mounts": ["/a", "/b:/c:ro"]}
    teller = tmp_path / "driver.sh"
    teller.write_text('echo "in $IN_IMAGE" > "$2/told"\n')
    made = make_run(tmp_path / "runs", 2, venv=venv, **image)
    job_id = submit_sbatch(made.config, made.layout, made.run, f"bash {teller}")
    slurm.wait_state(int(job_id), "COMPLETED", timeout_s=_DEADLINE_S)
    assert made.end == (DONE, ""), logs(made)
    run = made.run.path
    words = calls.read_text()
    if kind == "apptainer":
        inside = f"exec --bind={run}:{run} --bind=/a:/a --bind=/b:/c:ro x.sif {venv}/bin/python"
        assert words == f"{inside} -P -m jobs.node {run} --driver bash {teller}\n" * 2
        assert (run / "told").read_text() == "in x.sif\n"
    else:
        mounts = f"--container-mounts={run}:{run},/a:/a,/b:/c:ro"
        assert words == f"--container-image=x.sif {mounts} --container-env=PYTHONPATH "
        assert (run / "told").read_text() == "in pyxis\n"
