"""A job that accounting would never let start is refused at submission, as a real SLURM has it."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from nanoslime.config.cluster import ClusterConfig
from nanoslime.config.run import RunConfig
from nanoslime.layout import Layout
from nanoslime.types import RunError
from tests import process_table
from tests.jobs.made_run import make_run
from tests.slurm.accounting import user_name
from tests.slurm.cluster import SlurmCluster
from tools.submit import grpo, limits, policies
from tools.sweep import command as sweeps

USER = user_name()
OF_USER = ["user", "where", f"name={USER}", "account=physics", "set"]
# What sacctmgr modifies and undoes, what the job asks for, the refusal, and SLURM's own reason.
LIMITS = [
    (
        ["qos", "where", "name=high", "set", "MaxWall=20"],
        {"qos": "high", "time_limit_min": 25},
        r"cluster.time_limit_min=25: the QOS high allows at most 20 minutes \(MaxWall\)",
        "QOSMaxWallDurationPerJobLimit",
    ),
    (
        ["qos", "where", "name=high", "set", "MaxTRESPerUser=gres/gpu=8"],
        {"qos": "high"},
        r"gpus_per_node on cluster.nodes=2=16: the QOS high allows at most gres/gpu=8 \(MaxTRESPU",
        "QOSMaxGRESPerUser",
    ),
    (
        ["qos", "where", "name=normal", "set", "MaxTRESPerJob=node=1"],
        {},
        r"cluster.nodes=2: the QOS normal allows at most node=1 \(MaxTRES\)",
        "QOSMaxNodePerJobLimit",
    ),
    (
        ["qos", "where", "name=high", "set", "GrpTRES=cpu=64"],
        {"qos": "high"},
        r"cpus_per_node on cluster.nodes=2=128: the QOS high allows at most cpu=64 \(GrpTRES\)",
        "QOSGrpCpuLimit",
    ),
    (
        [*OF_USER, "MaxWall=10"],
        {},
        rf"time_limit_min=25: the association of {USER} with the account physics .* 10 minutes",
        "AssocMaxWallDurationPerJobLimit",
    ),
    (
        ["account", "where", "name=physics", "set", "GrpTRES=node=1"],
        {},
        r"cluster.nodes=2: the account physics allows at most node=1 \(GrpTRES\)",
        "AssocGrpNodeLimit",
    ),
    (
        [*OF_USER, "MaxJobs=0"],
        {},
        r"account physics lets no job start \(MaxJobs=0\), so that this one would wait for ever",
        "AssocMaxJobsLimit",
    ),
]


@pytest.fixture
def strict(strict_slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    monkeypatch.setenv("SLURM_CONF", str(strict_slurm.config_file))
    yield strict_slurm


def job(root, **cluster: object) -> tuple[RunConfig, Layout]:
    """Two nodes with eight GPUs each for 25 minutes."""
    made = make_run(root, 2, "cuda", gpus_per_node=8, time_limit_min=25, signal_lead_s=60)
    config = replace(made.config, cluster=replace(made.config.cluster, **cluster))
    return config, replace(made.layout, slots_per_node=8)


def modify(slurm: SlurmCluster, words: list[str]) -> None:
    slurm.run("sacctmgr", "--immediate", "--quiet", "modify", *words)


def reason_of(slurm: SlurmCluster, config: RunConfig) -> str:
    """Why SLURM lets such a job wait; empty where it starts it."""
    cluster = config.cluster
    options = [f"--time={cluster.time_limit_min}", "--nodes=2", "--ntasks-per-node=1"]
    options += ["--cpus-per-task=64", "--gres=gpu:8", "--output=/dev/null", "--wrap=true"]
    number = slurm.sbatch(*options, *([f"--qos={cluster.qos}"] if cluster.qos else []))

    def is_known() -> bool:
        found = slurm.job(number)
        waits = found["JobState"] == "PENDING" and found["Reason"] in ("None", "Priority")
        return not waits

    assert process_table.wait_for(is_known, 30, 0.2), slurm.job(number)
    found = slurm.job(number)
    slurm.run("scancel", str(number))
    return found["Reason"] if found["JobState"] == "PENDING" else ""


@pytest.mark.slurm
def test_what_the_limits_of_accounting_never_let_start_is_refused(
    strict: SlurmCluster, tmp_path
) -> None:
    config, layout = job(tmp_path / "none")
    limits.check_limits(config, layout)
    assert reason_of(strict, config) == ""
    for number, (words, cluster, refusal, reason) in enumerate(LIMITS):
        config, layout = job(tmp_path / str(number), **cluster)
        modify(strict, words)
        try:
            with pytest.raises(RunError, match=refusal):
                limits.check_limits(config, layout)
            assert reason_of(strict, config) == reason
        finally:
            name, _, value = words[-1].partition("=")
            resource = value.rpartition("=")[0]
            modify(strict, [*words[:-1], f"{name}={f'{resource}=' if resource else ''}-1"])
        limits.check_limits(config, layout)


@pytest.mark.slurm
@pytest.mark.parametrize("option", ["--print-sbatch", "--dry-run", "--prepare", "--sweep"])
def test_what_the_partition_never_starts_is_neither_printed_nor_prepared(
    strict: SlurmCluster, tmp_path, option, capsys
) -> None:
    (tmp_path / "sweep.yaml").write_text("name: s\ngrid: {lr: [1e-3]}\n")
    words = ["--nodes", "4", "--time-limit-min", "60", "--run-root", str(tmp_path / "runs")]
    if option == "--sweep":
        code = sweeps.main(["--sweep", str(tmp_path / "sweep.yaml"), *words])
    else:
        code = grpo.main([option, *words])
    out, err = capsys.readouterr()
    assert code == 2
    assert "cluster.time_limit_min=60: the partition short allows at most 30" in out + err
    assert not (tmp_path / "runs").exists()


def limit(owner: str, **by_name: str) -> policies.Limits:
    return policies.Limits(owner, by_name)


def test_the_partitions_qos_goes_before_that_of_the_job_and_both_before_the_accounts(
    tmp_path,
) -> None:
    config, layout = job(tmp_path, qos="mine")
    qos = {
        "mine": limit("the QOS mine", MaxTRES="node=1,cpu=1000"),
        "part": limit("the QOS part", MaxTRES="node=4"),
    }
    associations = (limit("the account a", MaxTRES="cpu=4,node=1"),)
    asked = policies.Policies(qos=qos, associations=associations)
    policies.check(config, layout, asked, "part")
    with pytest.raises(RunError, match="cluster.nodes=2: the QOS mine allows at most node=1"):
        policies.check(config, layout, asked, "")
    overriding = replace(asked, overrides_partition=frozenset(["mine"]))
    with pytest.raises(RunError, match="cluster.nodes=2: the QOS mine allows at most node=1"):
        policies.check(config, layout, overriding, "part")
    alone = replace(asked, qos={})
    with pytest.raises(RunError, match="the account a allows at most cpu=4"):
        policies.check(config, layout, alone, "part")


def test_a_qos_may_ask_for_more_than_the_job_takes(tmp_path) -> None:
    config, layout = job(tmp_path)
    asked = policies.Policies(qos={"normal": limit("the QOS normal", MinTRES="gres/gpu=32")})
    with pytest.raises(RunError, match="takes no job with less than gres/gpu=32"):
        policies.check(config, layout, asked, "")


def test_what_sacctmgr_rounds_is_taken_for_the_most_that_it_can_mean(tmp_path) -> None:
    found = policies.amounts("cpu=4,mem=1.46T,gres/gpu:h100=8,license/x=?,")
    assert {name: float(amount) for name, amount in found.items()} == {
        "cpu": 4,
        "mem": pytest.approx(1.465 * 2**20),
        "gres/gpu:h100": 8,
    }
    config, layout = job(tmp_path, memory_per_node="1500G")
    qos = {"normal": limit("the QOS normal", MaxTRESPerNode="mem=1.46T")}
    policies.check(config, layout, policies.Policies(qos=qos), "")
    config, layout = job(tmp_path / "more", memory_per_node="1501G")
    with pytest.raises(RunError, match=r"cluster.memory_per_node \(MB\)=1537024: the QOS normal"):
        policies.check(config, layout, policies.Policies(qos=qos), "")


def test_nothing_is_asked_where_slurm_enforces_nothing(monkeypatch) -> None:
    asked = []

    def says(*command: str) -> str:
        asked.append(command[0])
        return "AccountingStorageEnforce = associations,qos\n"

    monkeypatch.setattr(policies, "slurm_says", says)
    config = RunConfig(cluster=ClusterConfig(nodes=1))
    assert policies.ask(config) == policies.Policies()
    assert asked == ["scontrol"]
