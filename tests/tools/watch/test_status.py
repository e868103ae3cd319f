"""What is told of a run, whatever became of it."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.checkout import ROOT
from nanoslime.run_dir import DONE
from tests.jobs.made_run import make_run
from tests.tools.watch.watched import stand_in, write_phases
from tools.watch.status import Phase, RunStatus, _num_kept


def lines(text: str) -> dict[str, str]:
    """By subject what is told of it."""
    return {line[:9].strip(): line[10:] for line in text.splitlines()}


def test_a_run_that_has_lived_tells_each_attempt_its_end_and_its_cause(lived, told):
    page = lines(told("status", lived.path))
    assert page["state"] == "done" and page["step"] == "6 of 6"
    one, two, three = (page[f"attempt {number}"] for number in (1, 2, 3))
    assert "steps 0 to 3, failed: OSError: the third rollout is cursed" in one
    # The stop comes before the fifth rollout, or after it.
    stopped_at = re.search(r"steps 2 to ([45]), stopped: a test asked$", two)[1]
    assert three.endswith(f"steps {stopped_at} to 6, done")
    assert re.fullmatch(r"\d\.\d{3}, from \d\.\d{3}", page["reward"])
    assert (
        "generate" in page["seconds"] and page["idle"] == "engines and trainers share their devices"
    )


def test_hours_are_those_of_all_attempts_and_only_steps_made_again_are_lost(lived):
    status = RunStatus(lived.path)
    unit, hours = status.hours()
    assert unit == "node hours"
    for life, spent in zip(status.lives, hours, strict=True):
        lived_s = life.phases[-1].end - life.phases[0].begin
        assert sum(spent.values()) * 3600 == pytest.approx(lived_s)
        assert spent["start"] > 0 and spent["work"] > 0 and spent["waiting"] == 0
    assert hours[0]["lost"] > 0 and hours[1]["lost"] == hours[2]["lost"] == 0
    # The third rollout was made, and the fourth had begun.
    _commit, *lost = [phase for phase in status.lives[0].phases if phase.step >= 2]
    assert [phase.name for phase in lost] == ["generate", "train", "weight_sync", "generate"]
    assert hours[0]["lost"] * 3600 == pytest.approx(sum(phase.end - phase.begin for phase in lost))


@pytest.mark.parametrize(
    ("phases", "resumed_at", "kept"),
    [
        ("generate0 train0 weight_sync0 checkpoint1", 1, 4),
        ("generate0 train0 weight_sync0 checkpoint1 generate1 train1", 1, 4),
        # It was killed while it saved: nothing of the step is there.
        ("generate0 train0 weight_sync0 checkpoint1 generate1 train1 checkpoint1", 1, 4),
        # The stop came while it sampled, and what was sampled went into the commit.
        ("generate0 train0 weight_sync0 generate1 checkpoint1", 1, 5),
        ("evaluate0 generate0 train0", 0, 1),
        ("evaluate0 generate0 train0 weight_sync0 evaluate1 checkpoint1 generate1", 1, 6),
        ("evaluate0 generate0 train0 weight_sync0 generate1", float("inf"), 5),
        ("generate4 train4 weight_sync4 checkpoint5 generate5 train5 checkpoint5", 6, 7),
        ("", 0, 0),
    ],
)
def test_what_the_next_attempt_went_on_from_is_kept(phases, resumed_at, kept):
    made = [Phase(word[:-1], int(word[-1]), 0.0, 1.0) for word in phases.split()]
    assert _num_kept(made, resumed_at) == kept


def test_hours_of_gpus_by_hand(tmp_path, monkeypatch):
    """Two nodes of eight GPUs: ranks on the one, an engine of one GPU on the other."""
    made = make_run(tmp_path, 2, "cuda", gpus_per_node=8)
    begin = time.time() - 10_000
    write_phases(
        made.run,
        ("model", 0, begin),
        ("generate", 0, begin + 100),
        ("train", 0, begin + 200),
        ("weight_sync", 0, begin + 260),
        ("checkpoint", 1, begin + 280),
        ("generate", 1, begin + 300),
        ("failed", 1, begin + 900, "no"),
    )
    write_phases(made.run, ("model", 0, begin + 1000), ("generate", 1, begin + 1060))
    row = {"step": 0, "time/step_s": 180.0, "time/generate_s": 90.0, "time/weight_sync_s": 18.0}
    made.run.metrics.write_text(json.dumps(row) + "\n")
    status = RunStatus(made.run.path)
    # Of a step engines wait for train (40%), two ranks for generate (50%).
    idle = {"engines": 0.4, "trainers": 0.5, "all devices": (0.4 + 2 * 0.5) / 3}
    assert status.idle() == pytest.approx(idle)
    unit, (first, second) = status.hours()
    assert unit == "GPU hours"
    share = idle["all devices"]
    expected = {"start": 100, "work": 200 * (1 - share), "lost": 600, "waiting": 200 * share}
    assert first == pytest.approx({kind: s * 16 / 3600 for kind, s in expected.items()})
    assert second["start"] == pytest.approx(60 * 16 / 3600)


@pytest.mark.parametrize("cluster", [{"colocate": True}, {}])
def test_devices_that_are_shared_have_no_idle_share(tmp_path, cluster):
    made = make_run(tmp_path, 2 if cluster else 1, **cluster)
    row = {"step": 0, "time/step_s": 180.0, "time/generate_s": 90.0}
    made.run.metrics.write_text(json.dumps(row) + "\n")
    assert RunStatus(made.run.path).idle() == {}


def test_a_run_that_never_started_says_so(tmp_path, told, monkeypatch):
    run = make_run(tmp_path, 2).run
    page = lines(told("status", run.path))
    assert page["state"] == "never started" and page["step"].startswith("0 of ")
    assert "never started" in told("ps", "--run-root", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert Path(told("report", run.path).strip()) == tmp_path / "run.html"


def test_a_run_is_named_by_its_path_or_below_the_run_root(lived, told, refused, tmp_path):
    root = lived.path.parent
    for argv in ([lived.path], ["lived", "--run-root", root], [f"{root}/./lived"]):
        assert lines(told("status", *argv))["run"] == str(lived.path)
    assert "is not a run directory" in refused("status", "nothing", "--run-root", root)
    assert f"{tmp_path} holds no run; give another --run-root" in refused(
        "ps", "--run-root", tmp_path
    )
    line = told("ps", "--run-root", root)
    assert line.startswith("lived ") and "; done; " not in line and "done; 6 of 6" in line
    assert told("ps", lived.path) == line


def test_a_live_run_tells_its_phase_how_long_and_when_it_ends(tmp_path, told):
    made = make_run(tmp_path, 1)
    attempt = made.run.new_attempt()
    begin = time.time() - 100
    phases = [("model", 0, begin), ("generate", 0, begin + 10)]
    phases += [("train", 0, begin + 40), ("generate", 1, begin + 50), ("generate", 2, begin + 90)]
    rows = [dict(zip(("phase", "step", "time"), phase, strict=True)) for phase in phases]
    attempt.phases.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = lines(told("status", made.run.path))
    num_rollout = made.config.rollout.num_rollout
    assert page["state"] == "running"
    assert re.fullmatch(rf"2 of {num_rollout}, generate for 1[0-2] s", page["step"])
    # Two steps took 80 s.
    assert RunStatus(made.run.path).eta_s() == pytest.approx(40.0 * (num_rollout - 2))
    assert page["ETA"].split(",")[0].endswith(("min", "h"))


@pytest.mark.parametrize(
    ("record", "beat_age_s", "outcome"),
    [
        ({"host": "elsewhere"}, 5, "running"),
        ({"host": "elsewhere"}, 900, "vanished"),
        ({"host": "elsewhere"}, None, "vanished"),
        ({}, None, "running"),
        ({"pid": 2**22 + 1}, 5, "vanished"),
        # Somebody else has its number by now.
        ({"started": 1000.0}, None, "vanished"),
    ],
)
def test_an_attempt_without_an_end_lives_while_its_process_or_its_heart_does(
    tmp_path, record, beat_age_s, outcome
):
    run = make_run(tmp_path, 1).run
    attempt = run.new_attempt()
    path = attempt.path / "attempt.json"
    assert json.loads(path.read_text())["pid"] == os.getpid()
    path.write_text(json.dumps(json.loads(path.read_text()) | record))
    if beat_age_s is not None:
        beat = {"count": 1, "time": time.time() - beat_age_s}
        (attempt.path / "heartbeat" / "0.json").write_text(json.dumps(beat))
    assert RunStatus(run.path).state == outcome
    attempt.end(DONE, "")
    assert RunStatus(run.path).state == "done"


def test_an_attempt_that_another_followed_has_vanished(tmp_path, told):
    run = make_run(tmp_path, 1).run
    write_phases(run, ("generate", 0, time.time() - 50))
    write_phases(run, ("generate", 0, time.time() - 5))
    first, second = RunStatus(run.path).lives
    assert (first.outcome, second.outcome) == ("vanished", "running")
    assert re.match(r"not heard of after .*, in phase generate", first.cause)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_files_that_are_half_written_count_as_not_known(lived, told, tmp_path, share):
    """Each file of the run in turn, and then all of them, are cut."""
    run = tmp_path / "cut"
    shutil.copytree(lived.path, run, symlinks=True)
    files = [file for file in sorted(run.rglob("*")) if file.is_file() and not file.is_symlink()]
    small = [file for file in files if file.suffix in (".json", ".jsonl", ".yaml", ".log")]
    for file in small:
        whole = file.read_bytes()
        file.write_bytes(whole[: int(len(whole) * share)])
        told("status", run)
    for file in files:
        os.truncate(file, int(file.stat().st_size * share))
    told("status", run)
    told("ps", "--run-root", tmp_path)
    told("report", run, "--out", tmp_path / "page.html")
    told("logs", run, "--attempt", 0)


@pytest.mark.skipif(os.getuid() != 0, reason="only root may mount a directory read-only")
def test_all_that_looks_works_on_a_read_only_run(lived, tmp_path):
    root = tmp_path / "ro"
    root.mkdir()
    commands = [["ps", "--run-root", str(root)], ["status", "lived", "--run-root", str(root)]]
    commands += [["logs", f"{root}/lived", "--tail", "1"], ["tunnel", f"{root}/lived"]]
    commands += [["samples", f"{root}/lived", "--worst", "1"], ["report", f"{root}/lived"]]
    looks = (
        f"import sys; from tools.watch.commands import main; sys.exit(sum(map(main, {commands})))"
    )
    lines = [
        ["mount", "--bind", str(lived.path.parent), str(root)],
        ["mount", "-o", "remount,bind,ro", str(root)],
        ["sh", "-c", f"! touch {root}/lived/x 2> /dev/null"],
        ["env", f"PYTHONPATH={ROOT}", sys.executable, "-c", looks],
    ]
    script = "\n".join(shlex.join(line) for line in lines)
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-ec", script], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "lived.html").is_file()


@pytest.mark.parametrize(
    ("queue", "state", "job"),
    [
        ("12|PENDING|Resources|4:00:00 left on ", "PENDING (Resources)", "PENDING"),
        ("12|RUNNING|None|1:00:00 left on n[1-2]", "running", "RUNNING"),
        ("12|COMPLETING|None|1:00:00 left on n[1-2]", "running", "COMPLETING"),
        ("9|RUNNING|None|1:00:00 left on n1", "vanished", "not in the queue any more"),
        ("", "vanished", "not in the queue any more"),
    ],
)
def test_the_state_of_the_job_and_slurms_reason_are_told(
    tmp_path, programs, told, queue, state, job
):
    stand_in(programs, "squeue", f"echo '{queue}'")
    run = make_run(tmp_path / "runs", 2).run
    (run.path / "job.json").write_text('{"job_id": "12", "submitted_by": "sbatch"}')
    write_phases(run, ("generate", 0, time.time() - 1000))
    page = lines(told("status", run.path))
    assert page["state"] == state
    assert page["job"].startswith(f"12  {job}")


@pytest.mark.parametrize(
    ("queue", "before", "after"),
    [
        ("12|PENDING|Priority|4:00 left on ", "PENDING (Priority)", "PENDING (Priority)"),
        ("12|RUNNING|None|4:00 left on n1", "never started, job RUNNING", "stopped, job RUNNING"),
    ],
)
def test_a_job_whose_attempt_has_not_begun_is_told(tmp_path, programs, told, queue, before, after):
    stand_in(programs, "squeue", f"echo '{queue}'")
    run = make_run(tmp_path / "runs", 2).run
    (run.path / "job.json").write_text('{"job_id": "12"}')
    assert lines(told("status", run.path))["state"] == before
    write_phases(run, ("generate", 0, time.time() - 1000), ("stopped", 0, time.time()))
    assert lines(told("status", run.path))["state"] == after


def test_a_job_of_the_template_is_found_by_its_attempt(tmp_path, programs, told):
    calls = stand_in(programs, "squeue", "echo '77|RUNNING|None|1:00 left on n1'")
    run = make_run(tmp_path / "runs", 1).run
    run.new_attempt("77-3")
    assert lines(told("status", run.path))["job"].startswith("77  RUNNING")
    assert f"--user={os.getuid()}" in calls.read_text()
    rehearsed = make_run(tmp_path / "others", 1).run
    rehearsed.new_attempt("l4711-0")
    assert "job" not in lines(told("status", rehearsed.path))
