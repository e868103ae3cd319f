"""A model on a node's own disk: one reader, checked, reused, evicted, or not there at all."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from jobs.agent import Agent
from jobs.checkout import ROOT
from jobs.cluster_env import ClusterEnv
from jobs.ray_node import environment
from jobs.staging import (
    Copy,
    Staged,
    Staging,
    StagingTask,
    kept_caches,
    own_folder,
    wants_copy,
    why_not,
)
from nanoslime.config.cluster import ClusterConfig
from nanoslime.config.load import dump
from nanoslime.orchestration.ray.actors import RunOnRay
from nanoslime.storage.shared_files import publish_json, read_json
from nanoslime.types import MachineFailure
from tests import process_table
from tests.full_disk import fill
from tests.jobs.made_run import MadeRun, driver, make_run, make_venv_with_fake_ray

_DEADLINE_S = 60.0


def make_model(folder: Path, num_bytes: int = 400_000, fill: bytes = b"w") -> Path:
    """A checkpoint of one tensor, beside files that nobody reads."""
    folder.mkdir(parents=True)
    facts = {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}
    header = json.dumps({"weight": facts}).encode()
    weights = len(header).to_bytes(8, "little") + header + fill * num_bytes
    (folder / "blob").mkdir()
    (folder / "blob" / "0").write_bytes(weights)
    # As in a snapshot of the hub.
    (folder / "model.safetensors").symlink_to("blob/0")
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(weights)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "shared" / "Tiny-1B")


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node's disk; /tmp may be in memory here."""
    monkeypatch.setattr("jobs.staging._IN_MEMORY", ())
    return tmp_path / "disk"


def run_on(root: Path, model: Path, disk: Path, **cluster: Any) -> MadeRun:
    made = make_run(root, 2, local_storage=str(disk), **cluster)
    config = replace(made.config, model=replace(made.config.model, hf_checkpoint=str(model)))
    made.run.new_attempt("42-0")
    return MadeRun(config, made.layout, made.run)


def stage_all(made: MadeRun, *nodes: int, keep: bool = False) -> list[dict[str, Any]]:
    """The agents' part on these nodes, at the same time; what is said of each. They leave then,
    unless they shall keep what they hold.
    """
    attempt = made.run.latest_attempt()
    assert attempt is not None
    stagings = [Staging(StagingTask.of_model(attempt, made.config, node)) for node in nodes]

    def are_done() -> bool:
        return all(staging.is_done() for staging in stagings)

    assert process_table.wait_for(are_done, _DEADLINE_S)
    for staging in stagings:
        if staging._lock >= 0 and not keep:
            os.close(staging._lock)
    return [read_json(attempt.staged(node)) for node in nodes]


def test_a_node_has_what_readers_open_and_a_second_run_reads_that(
    tmp_path: Path, model: Path, disk: Path
) -> None:
    made = run_on(tmp_path / "a", model, disk)
    [first] = stage_all(made, 0)
    copy = Path(first["path"])
    assert copy.is_relative_to(disk) and first["note"] == ""
    assert sorted(file.name for file in copy.glob("[!.]*")) == ["config.json", "model.safetensors"]
    weights = model / "model.safetensors"
    assert (copy / "model.safetensors").read_bytes() == weights.read_bytes()
    assert first["copied_bytes"] == 2 + weights.stat().st_size
    # Who reads the shared file again would have something else.
    facts = weights.stat()
    (model / "blob" / "0").write_bytes(b"x" * facts.st_size)
    os.utime(weights, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    [second] = stage_all(run_on(tmp_path / "b", model, disk), 0)
    assert second == {"path": first["path"], "copied_bytes": 0, "note": ""}


def test_of_all_agents_on_a_node_one_reads_the_shared_files(
    tmp_path: Path, model: Path, disk: Path
) -> None:
    made = run_on(tmp_path, model, disk)
    said = stage_all(made, 0, 1)
    assert len({each["path"] for each in said}) == 1
    assert sum(each["copied_bytes"] for each in said) == Copy.of(model, disk).num_bytes


def test_a_model_that_has_changed_is_another_one(tmp_path: Path, model: Path, disk: Path) -> None:
    [first] = stage_all(run_on(tmp_path / "a", model, disk), 0)
    (model / "config.json").write_text('{"now": "longer"}')
    [second] = stage_all(run_on(tmp_path / "b", model, disk), 0)
    assert first["path"] != second["path"]
    assert (Path(second["path"]) / "config.json").read_text() == '{"now": "longer"}'


def test_a_copy_that_has_changed_on_the_disk_is_made_anew(
    tmp_path: Path, model: Path, disk: Path
) -> None:
    [first] = stage_all(run_on(tmp_path / "a", model, disk), 0)
    weights = Path(first["path"]) / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(1000)
        file.write(b"rot")
    [second] = stage_all(run_on(tmp_path / "b", model, disk), 0)
    assert second == first
    assert weights.read_bytes() == (model / "model.safetensors").read_bytes()


def test_a_node_that_reads_something_else_than_the_others_is_refused(
    tmp_path: Path, model: Path, disk: Path
) -> None:
    made = run_on(tmp_path, model, disk)
    key = Copy.of(model, disk).key
    other = {"config.json": "0", "model.safetensors": "0"}
    (made.run.path / f"manifest-{key}.json").write_text(json.dumps(other))
    says = "config.json was read twice on .*, and is not what the other nodes have read"
    with pytest.raises(MachineFailure, match=says):
        stage_all(made, 0)


def test_a_file_that_is_cut_short_is_not_taken(tmp_path: Path, model: Path, disk: Path) -> None:
    os.truncate(model / "blob" / "0", 1000)
    with pytest.raises(MachineFailure, match=r"model.safetensors.*; log: .*staging-0.log"):
        stage_all(run_on(tmp_path, model, disk), 0)
    assert list(disk.glob("nanoslime-*/*Tiny*/")) == []


def test_the_oldest_copy_that_nobody_uses_makes_room(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.staging._IN_MEMORY", ())
    models = [make_model(tmp_path / "shared" / f"m{i}", 800_000) for i in range(6)]

    def stage_one(number: int, *, keep: bool = False) -> dict[str, Any]:
        made = run_on(tmp_path / f"run{number}", models[number], small_disk)
        return stage_all(made, 0, keep=keep)[0]

    def kept() -> list[str]:
        copies = small_disk.glob("nanoslime-*/m*/")
        return sorted(copy.name[:2] for copy in copies)

    for number in range(3):
        stage_one(number, keep=number == 1)
    assert kept() == ["m0", "m1", "m2"]
    stage_one(3)
    assert kept() == ["m1", "m2", "m3"]
    # The oldest one is in use.
    stage_one(4, keep=True)
    assert kept() == ["m1", "m3", "m4"]
    fill(small_disk, leave_bytes=4096)
    said = stage_one(5)
    assert kept() == ["m1", "m4"]
    assert said["path"] == str(models[5])
    assert said["note"].endswith("takes 0.0 GiB") and "GiB free" in said["note"]


def test_memory_is_no_disk(tmp_path: Path, small_disk: Path, model: Path) -> None:
    [said] = stage_all(run_on(tmp_path, model, small_disk), 0)
    assert said["path"] == str(model)
    assert "is in the node's memory (tmpfs)" in said["note"]
    assert list(small_disk.iterdir()) == []


def test_where_nothing_can_be_written_all_read_the_shared_files(
    tmp_path: Path, model: Path, disk: Path
) -> None:
    disk.write_text("a file")
    [said] = stage_all(run_on(tmp_path, model, disk), 0)
    assert said["path"] == str(model)
    assert "nothing can be written there" in said["note"]


def test_only_a_node_with_a_disk_of_its_own_wants_a_copy(tmp_path: Path, model: Path) -> None:
    assert wants_copy(run_on(tmp_path / "a", model, tmp_path).config)
    assert not wants_copy(run_on(tmp_path / "b", model, tmp_path, stage_model=False).config)
    assert not wants_copy(make_run(tmp_path / "c", 1, local_storage="/local").config)


def test_what_a_node_compiles_is_kept_on_its_disk_unless_the_site_says_otherwise(
    tmp_path: Path,
) -> None:
    caches = kept_caches(ClusterConfig(local_storage=f"{tmp_path}/local"))
    own = f"{tmp_path}/local/nanoslime-{os.getuid()}/caches"
    base = {"TRITON_CACHE_DIR": "/mine"}
    env = environment(base, Path("/token"), Path("/scratch"), caches)
    assert env["TRITON_CACHE_DIR"] == "/mine"
    assert env["TORCHINDUCTOR_CACHE_DIR"] == f"{own}/inductor"
    assert env["FLASHINFER_WORKSPACE_BASE"] == f"{own}/flashinfer"
    assert Path(own).is_dir()
    assert kept_caches(ClusterConfig()) is None
    # A node without the directory does without it.
    (tmp_path / "file").touch()
    for where in ("caches", "local_storage"):
        assert kept_caches(ClusterConfig(**{where: f"{tmp_path}/file/caches"})) is None
    assert "TORCHINDUCTOR_CACHE_DIR" not in environment({}, Path("/token"), Path("/scratch"))


def test_what_a_container_writes_into_itself_is_no_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside a container the root of a node without a disk may be one too."""
    for kind in ("overlay", "fuse.fuse-overlayfs"):
        monkeypatch.setattr("jobs.staging._filesystem", lambda path, kind=kind: kind)
        assert f"is in the container ({kind})" in why_not(tmp_path, "apptainer")
        assert why_not(tmp_path) == ""
    monkeypatch.setattr("jobs.staging._filesystem", lambda path: "ext4")
    assert why_not(tmp_path, "pyxis") == ""


def test_a_copy_that_takes_too_long_is_let_go_of(tmp_path: Path, model: Path, disk: Path) -> None:
    """Another agent's lock keeps it waiting."""
    made = run_on(tmp_path, model, disk)
    lock = Copy.of(model, disk).open_lock()
    fcntl.flock(lock, fcntl.LOCK_EX)
    staging = Staging(StagingTask.of_model(made.run.attempt(1), made.config, 0))
    child = staging._child
    assert child is not None
    staging.give_up("too long")
    assert child.returncode == -signal.SIGKILL
    os.close(lock)
    with (own_folder(disk) / f"{Copy.of(model, disk).key}.lock").open() as again:
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert read_json(made.run.attempt(1).staged(0))["note"] == "too long"


def test_a_copy_that_is_given_up_in_the_middle_holds_nobody_up(
    tmp_path: Path, model: Path, disk: Path
) -> None:
    made = run_on(tmp_path, model, disk)
    staging = Staging(StagingTask.of_model(made.run.attempt(1), made.config, 0))
    assert process_table.wait_for(staging.is_done, _DEADLINE_S)
    staging.give_up("it was done too late")
    with (own_folder(disk) / f"{Copy.of(model, disk).key}.lock").open() as again:
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_node_that_is_lost_is_not_waited_for(
    tmp_path: Path, small_disk: Path, model: Path
) -> None:
    made = run_on(tmp_path, model, small_disk, stage_deadline_s=40.0)
    attempt = made.run.attempt(1)
    agent = Agent(attempt, made.config, made.layout, ClusterEnv.for_local(0, 2, "l1"), "")
    publish_json(attempt.lost(1), {"name": "node1"})
    began = time.monotonic()
    agent._stage()
    assert time.monotonic() - began < 20


def test_halves_of_copies_make_room_first(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed copy has left; one that is being made stays."""
    monkeypatch.setattr("jobs.staging._IN_MEMORY", ())
    whole, new = (make_model(tmp_path / "shared" / name, 800_000) for name in ("whole", "new"))
    stage_all(run_on(tmp_path / "a", whole, small_disk), 0)
    storage = own_folder(small_disk)
    halves = [storage / name for name in (".dead", ".made", f".{Copy.of(new, small_disk).key}")]
    for half in halves:
        half.mkdir()
        (half / "model.safetensors").write_bytes(b"w" * 600_000)
    with (storage / "made.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        [said] = stage_all(run_on(tmp_path / "b", new, small_disk), 0)
    assert said["note"] == ""
    assert [half.exists() for half in halves] == [False, True, False]
    assert list(storage.glob("whole-*/")), "there was room without it"


STAGE = """
import sys, time
from pathlib import Path
from jobs.staging import Staging, StagingTask
from nanoslime.config.load import read
from nanoslime.run_dir import RunDir

run = RunDir.open(Path(sys.argv[1]))
config = read(run.config)
nodes = map(int, sys.argv[2:])
stagings = [Staging(StagingTask.of_model(run.attempt(1), config, node)) for node in nodes]
while not all([staging.is_done() for staging in stagings]):
    time.sleep(0.05)
for line in Path("/proc/self/io").read_text().splitlines():
    print(line)
"""


def read_bytes_of_staging(made: MadeRun, *nodes: int) -> int:
    """All bytes that the processes of these nodes have read, without a network where we may."""
    made.run.config.write_text(dump(made.config))
    isolated = ["unshare", "-n"] if os.getuid() == 0 else []
    command = [*isolated, sys.executable, "-c", STAGE, str(made.run.path), *map(str, nodes)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    # The kernel adds those of a child when it has been waited for.
    return int(dict(line.split(": ") for line in done.stdout.splitlines())["rchar"])


def test_two_nodes_read_the_shared_model_once_each_and_need_no_network(
    tmp_path: Path, disk: Path
) -> None:
    """Each node's disk is a directory, as if it were on the node."""
    big = make_model(tmp_path / "shared" / "big", 64 * 2**20)
    tiny = make_model(tmp_path / "shared" / "tiny", 1000)
    read: list[int] = []
    for model in (tiny, big):
        total = 0
        for node in range(2):
            made = run_on(tmp_path / f"{model.name}{node}", model, disk / str(node))
            total += read_bytes_of_staging(made, node)
            assert read_json(made.run.attempt(1).staged(node))["note"] == ""
        read.append(total)
    size = Copy.of(big, disk).num_bytes
    # Python and its modules are read in both cases. Nothing reads the copies.
    assert 2 * size <= read[1] - read[0] <= 1.05 * 2 * size


def test_an_agent_stages_the_model_before_ray_starts_and_lets_go_of_it_at_its_end(
    tmp_path: Path, model: Path, no_leftovers: None
) -> None:
    disk = tmp_path / "disk"
    if why_not(disk):
        pytest.skip(f"{tmp_path} is in memory")
    made = run_on(tmp_path / "runs", model, disk)
    made.run.config.write_text(dump(made.config))
    made.run.plan.write_text(make_run(tmp_path / "plan", 1).layout.to_json())
    python = make_venv_with_fake_ray(tmp_path / "venv") / "bin" / "python"
    command = [python, "-m", "jobs.node", made.run.path, "--attempt", "1", "--local-node", "0"]
    command += ["--driver", driver("fail")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    attempt = made.run.attempt(1)
    assert "the driver ended with exit code 3" in done.stderr
    staged = read_json(attempt.staged(0))
    assert Path(staged["path"]).is_relative_to(disk), staged
    assert attempt.staged(0).stat().st_mtime <= attempt.head.stat().st_mtime
    [lock] = disk.glob("nanoslime-*/*.lock")
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.ray
def test_the_actors_of_each_node_read_what_its_agent_has_staged(
    tmp_path: Path, model: Path, disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = run_on(tmp_path, model, disk)
    [staged] = stage_all(made, 1)
    attempt = made.run.attempt(1)
    publish_json(attempt.staged(2), asdict(Staged(str(model), note="no room")))
    run = RunOnRay(made.config, attempt, model)
    assert run.model_dir_on(1) == Path(staged["path"]) != model
    assert run.model_dir_on(0) == run.model_dir_on(2) == model
    assert "node 2 reads the shared model: no room" in caplog.text
