"""What a node is fit for: each check by a fault of its own, and the verdict by hand."""

import errno
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.checkout import ROOT
from jobs.cluster_env import ClusterEnv, remove_scratch, scratch_root
from jobs.ray_node import raise_limits
from nanoslime.run_dir import RunDir
from nanoslime.types import RunError
from tests.full_disk import fill, mounted
from tests.jobs.made_run import make_run
from tools.preflight import node as node_checks
from tools.preflight.gpus import check_ecc, check_gpus
from tools.preflight.node import (
    Place,
    Reading,
    active_hcas,
    check_space,
    examine,
    own_versions,
    quota_left,
    wanted_hcas,
)
from tools.preflight.rounds import Preflight
from tools.preflight.verdict import Echo, Report, Verdict, judge

SAME = {"python": "3.12.1", "torch": "2.9", "code": "c0de"}


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a stand-in for a program first in PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def make(name: str, shell: str) -> None:
        file = folder / name
        file.write_text(f"#!/bin/sh\n{shell}\n")
        file.chmod(0o755)

    return make


def place_of(tmp_path: Path, num_nodes: int = 2, **cluster: Any) -> Place:
    made = make_run(tmp_path, num_nodes, **cluster)
    env = ClusterEnv.for_local(0, num_nodes, "l0")
    return Place(env, made.layout, made.config.cluster, made.run.new_attempt().path)


def test_a_fit_node_has_a_value_for_every_check_that_applies(tmp_path: Path) -> None:
    readings = examine(place_of(tmp_path))
    found = {reading.check: reading.problem for reading in readings}
    applies = ["cores", "limits", "shm", "temp", "storage", "interface", "ports"]
    assert found == dict.fromkeys(applies, "")


def nvidia_smi(program: Any, counts: str, rows: str) -> None:
    """It knows the errors of each GPU, and what has become of their rows."""
    program("nvidia-smi", f"case $1 in *rows=*) printf '{rows}' ;; *) printf '{counts}' ;; esac")


def test_gpus_without_memory_errors_are_counted(program: Any) -> None:
    nvidia_smi(program, r"0, 0\n1, [N/A]\n", r"0:1b.0, No, No\n0:1c.0, [N/A], [N/A]\n")
    said = "2 GPUs, uncorrected errors since the driver was loaded: "
    assert check_ecc("n3", {}, 10) == f"{said}none"
    # Such an error has ended the program that had it.
    nvidia_smi(program, r"0, 0\n1, 3\n", r"0:1b.0, 0, 0\n0:1c.0, 0, 0\n")
    assert check_ecc("n3", {}, 10) == f"{said}3 on GPU 1"


def test_only_the_gpus_of_the_job_are_asked_for_errors(program: Any, tmp_path: Path) -> None:
    program("nvidia-smi", f'echo "$@" >> {tmp_path}/asked; printf "4, 0\\n"')
    for visible in ("4,5", "", "MIG-71"):
        check_ecc("n3", {"CUDA_VISIBLE_DEVICES": visible}, 10)
    asked = [line.split()[2:] for line in (tmp_path / "asked").read_text().splitlines()]
    assert asked == [["--id=4,5"], ["--id=4,5"], [], [], [], []]


@pytest.mark.parametrize(
    ("shell", "says"),
    [
        (
            r"case $1 in *rows=*) printf '0:1b.0, No, No\n0:1c.0, Yes, No\n' ;; esac",
            r"n3 has GPUs with broken memory \(GPU 0:1c.0: remapped rows pending\).*administrat",
        ),
        ("case $1 in *rows=*) echo 0:1b.0, 0, 1 ;; esac", r"\(GPU 0:1b.0: remapped rows failed\)"),
        ("printf '0, [GPU requires reset]\\n'", r"GPU 0: \[GPU requires reset\]"),
        ("echo Driver/library version mismatch; exit 18", "n3 fails with exit code 18: .*mismatch"),
        ("sleep 60", "nvidia-smi of n3 did not answer within 0.3 s"),
    ],
)
def test_broken_gpus_are_named(program: Any, shell: str, says: str) -> None:
    program("nvidia-smi", f"exec {shell}" if shell == "sleep 60" else shell)
    with pytest.raises(RunError, match=says):
        check_ecc("n3", {}, 0.3 if shell == "sleep 60" else 10)


def test_a_node_without_nvidia_smi_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert check_ecc("n3", {}, 10) == ""


@pytest.mark.parametrize(
    ("limit", "hcas", "says"),
    [
        ("--nofile=500:1000", [], r"n3 allows 1,000 open files \(ulimit -n\), and 4,096 .*NOFILE"),
        ("--nproc=500:900", [], r"n3 allows 900 processes and threads \(ulimit -u\).*LimitNPROC"),
        ("--memlock=65536", ["mlx5_0"], r"n3 allows 65,536 bytes of locked memory .*MEMLOCK"),
        ("--memlock=65536", [], "fit"),
        ("--nofile=500:9000", [], "fit: 9000 files"),
    ],
)
def test_limits_are_raised_as_far_as_they_go(limit: str, hcas: list[str], says: str) -> None:
    code = f"""
from jobs.ray_node import raise_limits
from tools.preflight.node import check_limits
raise_limits()
try:
    print("fit:", check_limits("n3", {hcas}))
except Exception as error:
    print(error)
"""
    command = ["prlimit", limit, sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert re.search(says, done.stdout), done


def test_adapters_count_that_have_an_active_port(tmp_path: Path) -> None:
    for adapter, state in (
        ("mlx5_0", "4: ACTIVE"),
        ("mlx5_1", "1: DOWN"),
        ("mlx5_2", "4: ACTIVE"),
        ("mlx5_3", "4: ACTIVE"),
    ):
        port = tmp_path / adapter / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        layer = "Ethernet" if adapter == "mlx5_3" else "InfiniBand"
        (port / "link_layer").write_text(f"{layer}\n")
    assert active_hcas(tmp_path) == ["mlx5_0", "mlx5_2"]
    assert active_hcas(tmp_path / "none") == []
    assert wanted_hcas({"NCCL_IB_DISABLE": "0"}, tmp_path) == ["mlx5_0", "mlx5_2"]
    for variable in ({"NCCL_IB_DISABLE": "1"}, {"NCCL_NET": "Socket"}):
        assert wanted_hcas(variable, tmp_path) == []


def test_memory_is_locked_only_where_nccl_takes_infiniband(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_checks, "active_hcas", lambda root: ["mlx5_0"])
    monkeypatch.setattr(node_checks, "_limit", lambda limit: 65_536)
    monkeypatch.delenv("NCCL_IB_DISABLE", raising=False)
    look = node_checks.CHECKS["limits"]
    at = place_of(tmp_path)
    gpus = Place(at.env, replace(at.layout, device="cuda"), at.cluster, at.attempt)
    assert look(at) == "65536 files, 65536 processes"
    with pytest.raises(RunError, match="node0 allows 65,536 bytes of locked memory"):
        look(gpus)
    monkeypatch.setenv("NCCL_IB_DISABLE", "1")
    assert look(gpus) == "65536 files, 65536 processes"


def test_a_limit_that_may_not_be_raised_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(limit: int, values: tuple[int, int]) -> None:
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (5000, 9000))
    raise_limits()
    assert node_checks.check_limits("n3", []) == "5000 files, 5000 processes"


def test_a_node_without_its_disk_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    root = scratch_root({}, f"{tmp_path}/file/scratch")
    at = place_of(tmp_path)
    env = ClusterEnv.for_local(0, 2, "l0", root=root)
    found = {r.check: r.problem for r in examine(Place(env, at.layout, at.cluster, at.attempt))}
    says = f"{root} of node0, where Ray keeps its sockets, .* is not there or cannot be written; "
    assert re.match(says, found["temp"]), found
    remove_scratch(env.scratch(at.attempt))


def test_an_error_of_a_check_tells_its_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(place: Place) -> str:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setitem(node_checks.CHECKS, "shm", look)
    found = {reading.check: reading.problem for reading in examine(place_of(tmp_path))}
    assert found["shm"] == "node0: [Errno 5] Input/output error"


@pytest.mark.parametrize(
    ("said", "interface", "finds"),
    [
        ("NodeName=n1 NodeAddr=127.0.0.9", "", "all nodes are found"),
        ("NodeName=n1 NodeAddr=nowhere.invalid", "", r"n2 does not find .*n1 \(nowhere.invalid\)"),
        ("NodeName=n1 NodeAddr=nowhere.invalid", "ib0", "not all nodes are found, and need not be"),
        ("", "", "not all nodes are found, and need not be"),
    ],
)
def test_names_have_addresses_where_they_lead_to_the_interface(
    program: Any, tmp_path: Path, said: str, interface: str, finds: str
) -> None:
    program("scontrol", f"echo {said}")
    at = place_of(tmp_path, network_interface=interface)
    env = ClusterEnv(1, 2, "n2", ("n1", "n2"), "127.0.0.1", "71", 0, 0)
    try:
        found = node_checks.CHECKS["names"](Place(env, at.layout, at.cluster, at.attempt))
    except RunError as error:
        found = str(error)
    assert re.match(finds, found)


def test_the_code_of_preflight_comes_before_that_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's own modules have the names of ours, and of torch."""
    at = place_of(tmp_path)
    run = RunDir.open(at.attempt.parent.parent)
    preflight = Preflight(run.attempt(1), at)
    preflight.reports.parent.joinpath("links.json").write_text("{}")
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "torch.py").write_text("from types import SimpleNamespace\nversion = cuda = None\n")
    users = tmp_path / "users"
    (users / "tools").mkdir(parents=True)
    for module in ("tools/__init__.py", "torch.py"):
        (users / module).write_text("import os\nos._exit(71)\n")
    monkeypatch.chdir(users)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ours}")
    with pytest.raises(RunError, match="does not start on node0: .*'NoneType'"):
        check_gpus(at.env, 2)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # It ends by itself, since links.json says nothing.
    preflight.take_part()
    assert preflight._measuring is not None
    assert preflight._measuring.wait(100) == 1


def test_a_full_folder_is_named_with_what_it_is_for(tmp_path: Path) -> None:
    with mounted(tmp_path):
        fill(tmp_path)
        with pytest.raises(RunError, match=r"of n3, Ray's, has 0.00 GiB free, and 1 GiB are .*try"):
            check_space("n3", "Ray's", tmp_path, 2**30, "try")


@pytest.mark.parametrize(
    ("answer", "left"),
    [
        ("/dev/sda1 1000* 900 3000 6days 10 0 0", 2000 * 1024),
        ("/dev/sda1 1000 1500 0 10 0 0", 500 * 1024),
        ("nas:/home/u 4000* 3000 3500 none 10 0 0", -500 * 1024),
        ("/dev/sda1 1000 0 0 10 0 0", None),
        ("none", None),
    ],
)
def test_what_a_quota_leaves(program: Any, tmp_path: Path, answer: str, left: int | None) -> None:
    heading = "Disk quotas for user u (uid 71):\\n Filesystem blocks quota limit grace files"
    program("quota", f"printf '{heading}\\n {answer}\\n'")
    assert quota_left(tmp_path) == left


def test_a_quota_that_is_used_up_is_a_fault_of_no_node(program: Any, tmp_path: Path) -> None:
    program("quota", "printf 'x\\n/dev/sda1 1000* 900 1001 6days 10 0 0\\n'")
    readings = examine(place_of(tmp_path))
    [problem] = [reading.problem for reading in readings if reading.problem]
    assert "the quota leaves 0.00 GiB in" in problem
    verdict = judge([Report("n1", readings, SAME), Report("n2", [], SAME)], {}, "")
    assert verdict.excluded == ()


def test_an_interface_that_a_node_does_not_have_is_its_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    environ = {"SLURM_JOB_ID": "71", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "n[1-2]"}
    env = ClusterEnv.from_slurm(environ, "ib9")
    at = place_of(tmp_path, network_interface="ib9")
    found = {r.check: r.problem for r in examine(Place(env, at.layout, at.cluster, at.attempt))}
    assert found["interface"].startswith("n2: cluster.network_interface=ib9 has no address on ")
    assert "ports" not in found
    assert found["names"] == ""


def test_an_address_that_is_not_the_nodes_own_takes_no_server(tmp_path: Path) -> None:
    at = place_of(tmp_path)
    env = ClusterEnv(0, 1, "n1", ("n1",), "192.0.2.7", "71", 0, 0)
    with pytest.raises(RunError, match="no server can listen at 192.0.2.7 of n1"):
        node_checks.CHECKS["ports"](Place(env, at.layout, at.cluster, at.attempt))


def test_the_code_is_among_the_versions() -> None:
    found = own_versions()
    assert {"python", "torch", "megatron-core", "sglang", "ray", "transformers"} <= found.keys()
    assert re.fullmatch("[0-9a-f]{12}", found["code"])
    assert found == own_versions()


def verdict_on(
    faults: dict[str, Reading] | None = None,
    versions: dict[str, dict[str, str]] | None = None,
    echoes: dict[str, Echo] | None = None,
    num_nodes: int = 4,
) -> Verdict:
    """All is well but for what is named."""
    names = [f"n{i}" for i in range(1, num_nodes + 1)]
    reports = []
    for name in names:
        readings = [(faults or {}).get(name) or Reading("cores", "2 cores")]
        reports.append(Report(name, readings, SAME | (versions or {}).get(name, {})))
    all_echoes = {name: Echo("tweet", 10.0, 10.0, 10.5) for name in names} | (echoes or {})
    return judge(reports, all_echoes, "tweet")


def test_a_table_has_a_line_for_what_nodes_have_in_common() -> None:
    verdict = verdict_on({"n3": Reading("cores", "unfit", "n3 is pinned")})
    assert (verdict.cause, verdict.excluded) == ("preflight: n3 is pinned", ("n3",))
    assert verdict.table.splitlines() == [
        "preflight            found                     nodes",
        "cores         ok     2 cores                   n1, n2, n4",
        "cores         UNFIT  unfit                     n3",
        "versions      ok     python 3.12.1, code c0de  all 4",
        "shared files  ok     within seconds            all 4",
        "clock         ok     within 5 s                all 4",
    ]
    assert verdict_on().cause == ""


def test_a_fault_of_all_nodes_is_none_of_theirs() -> None:
    pinned = {f"n{i}": Reading("cores", "unfit", f"n{i} is pinned") for i in range(1, 5)}
    verdict = verdict_on(pinned)
    assert verdict.cause == "preflight: n1 is pinned; n2 is pinned; n3 is pinned; n4 is pinned"
    assert verdict.excluded == ()


@pytest.mark.parametrize(("check", "excluded"), [("ecc", ("n1",)), ("limits", ())])
def test_of_one_node_only_its_own_faults_exclude_it(check: str, excluded: tuple[str, ...]) -> None:
    assert verdict_on({"n1": Reading(check, "unfit", "sick")}, num_nodes=1).excluded == excluded


def test_many_unfit_nodes_are_told_in_one_line() -> None:
    sick = {f"n{i}": Reading("ecc", "unfit", f"n{i} is sick") for i in range(1, 8)}
    verdict = verdict_on(sick, num_nodes=8)
    assert verdict.cause == (
        "preflight: n1 is sick; n2 is sick; n3 is sick; n4 is sick; and 3 nodes more"
    )
    assert "n1, n2, n3, n4 and 3 more" in verdict.table


@pytest.mark.parametrize("node", ["n1", "n3"])
def test_a_node_differs_whose_versions_are_not_those_of_most(node: str) -> None:
    verdict = verdict_on(versions={node: {"torch": "2.8", "code": "0ld"}})
    assert verdict.excluded == (node,)
    assert verdict.cause == (
        f"preflight: {node} has torch 2.8 (not 2.9), code 0ld (not c0de), unlike the other nodes; "
        "all nodes need one environment and one checkout"
    )


@pytest.mark.parametrize(
    ("echoes", "cause"),
    [
        ({"n3": Echo("tweet", 70.5, 10, 10.5)}, "the clock of n3 is 60 s ahead of those of the"),
        ({"n3": Echo("tweet", 3.0, 10, 10.5)}, "the clock of n3 is 7 s behind those of the other"),
        ({"n3": Echo("tweet", 12.0, 10, 10.5)}, ""),
        # Its answer came late, and nobody knows when within that time it was.
        ({"n3": Echo("tweet", 31.0, 10, 31.5)}, ""),
    ],
)
def test_a_clock_is_wrong_by_what_no_delay_explains(echoes: dict[str, Echo], cause: str) -> None:
    found = verdict_on(echoes=echoes).cause
    assert found.startswith(f"preflight: {cause}" if cause else "")
    assert bool(found) == bool(cause)


def test_the_clock_of_node_0_may_be_the_wrong_one() -> None:
    """The others answer 60 s before it has asked."""
    others = {name: Echo("tweet", 40.0, 100, 100.5) for name in ("n2", "n3", "n4")}
    verdict = verdict_on(echoes={"n1": Echo("tweet", 100.0, 100, 100.5), **others})
    assert verdict.excluded == ("n1",)
    assert verdict.cause.startswith("preflight: the clock of n1 is 60 s ahead of those of the")


def test_a_node_that_sees_other_files_is_named() -> None:
    verdict = verdict_on(echoes={"n3": Echo("old", 10.0, 10.0, 10.5)})
    assert verdict.excluded == ("n3",)
    assert verdict.cause.startswith("preflight: n3 reads something else in a file that n1 wrote")
    reports = [Report(name, [], SAME) for name in ("n1", "n2", "n3")]
    heard = {name: Echo("tweet", 10.0, 10.0, 10.5) for name in ("n1", "n2")}
    verdict = judge(reports, heard, "tweet")
    assert verdict.excluded == ("n3",)
    assert verdict.cause.startswith("preflight: n3 does not see a file that n1 wrote into the run")
