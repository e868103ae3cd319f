"""The file that is written on a real SLURM, with and without accounts, and what is asked for it."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanoslime.config.cluster import ClusterConfig
from nanoslime.config.load import load
from tests.slurm.cluster import SlurmCluster
from tools.site import command
from tools.submit import grpo as submit_grpo
from tools.submit import sites
from tools.watch.commands import default_run_root

pytestmark = pytest.mark.slurm


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's directory of cluster files, and a home of their own."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("SCRATCH", "WORK", "PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "config/nanoslime/clusters"


@pytest.fixture
def strict(strict_slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    monkeypatch.setenv("SLURM_CONF", str(strict_slurm.config_file))
    yield strict_slurm


def init_site(monkeypatch, *options: str, answers: str = "") -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(answers))
    return command.main(list(options))


def cluster_of(file: Path) -> ClusterConfig:
    return load(None, file, []).cluster


def test_enter_takes_what_slurm_says(strict, stored, tmp_path, monkeypatch, capsys):
    assert init_site(monkeypatch, answers="\n\n\n\n") == 0
    shown = capsys.readouterr().out
    assert shown.count("]: ") == 4, shown
    cluster = cluster_of(stored / "strict.yaml")
    assert (cluster.name, cluster.partition, cluster.account) == ("strict", "short", "physics")
    assert (cluster.gpus_per_node, cluster.cpus_per_node) == (8, 96)
    assert cluster.memory_per_node == "1400000M"
    # That of an h100, since no nvidia-smi tells it.
    assert cluster.gpu_memory_gib == 79
    assert (cluster.time_limit_min, cluster.signal_lead_s) == (30, 300)
    assert cluster.run_root == str(tmp_path / "nanoslime-runs")
    assert cluster.venv.endswith(".venv/cuda")
    assert "asked: node " in (stored / "strict.yaml").read_text()


def test_answers_are_taken_by_name_or_number_and_asked_again_where_wrong(
    strict, stored, tmp_path, monkeypatch, capsys
):
    answers = f"medium\n2\nchemistry\nbiology\n$HOME/runs\n{tmp_path}/mine\n/nowhere\n\n"
    assert init_site(monkeypatch, answers=answers) == 0
    shown = capsys.readouterr().out
    assert "'medium' is none of short, long" in shown
    assert "'chemistry' is none of" in shown
    assert "$HOME/runs: write the directory out" in shown
    assert "/nowhere holds no bin/python" in shown
    cluster = cluster_of(stored / "strict.yaml")
    assert (cluster.partition, cluster.account) == ("long", "biology")
    assert cluster.run_root == f"{tmp_path}/mine"
    # A preempted job of this partition has 60 s.
    assert (cluster.time_limit_min, cluster.signal_lead_s) == (240, 60)


def test_an_account_that_slurm_refuses_is_told_in_one_line(strict, stored, monkeypatch, capsys):
    assert init_site(monkeypatch, "--yes", "--account", "chemistry") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "nothing is stored" in line
    assert "Invalid account or account/partition combination" in line
    assert not stored.exists()


def test_nobody_is_asked_with_yes_and_an_earlier_file_is_kept(strict, stored, monkeypatch, capsys):
    stored.mkdir(parents=True)
    (stored / "strict.yaml").write_text("name: mine\n")
    assert init_site(monkeypatch, "--yes", "--no-srun", answers="2\n") == 0
    shown = capsys.readouterr().out
    assert "]: " not in shown
    assert "no node could be asked (--no-srun was given)" in shown
    assert cluster_of(stored / "strict.yaml").partition == "short"
    assert (stored / "strict.yaml.old").read_text() == "name: mine\n"


def test_commands_find_the_file_without_a_flag(strict, stored, monkeypatch, tmp_path, capsys):
    assert init_site(monkeypatch, "--yes", "--no-srun") == 0
    capsys.readouterr()
    flags = ["--nodes", "2", "--recipe", "rehearsal", "--dry-run"]
    for chosen in ([], ["--cluster", "strict"]):
        submit_grpo.main([*flags, *chosen])
        shown = capsys.readouterr()
        assert f"strict, as {stored / 'strict.yaml'} says" in shown.out, shown.err
        assert "#SBATCH --account=physics" in shown.out
    submit_grpo.main([*flags, "--nodes", "4", "--local"][2:])
    assert "strict" not in capsys.readouterr().out


def test_a_cluster_without_accounts_or_gpus(slurm_cluster, stored, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_CONF", str(slurm_cluster.config_file))
    assert init_site(monkeypatch, answers="\n\n\n") == 0
    assert capsys.readouterr().out.count("]: ") == 3
    cluster = cluster_of(stored / "test.yaml")
    assert (cluster.partition, cluster.account, cluster.gpus_per_node) == ("main", "", 0)
    assert sites.of_this_machine({"PATH": "/usr/bin", "XDG_CONFIG_HOME": str(stored.parents[1])})


def test_without_slurm_it_says_so_in_one_line(stored, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(stored))
    assert init_site(monkeypatch) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "no scontrol in PATH" in line


def test_runs_are_looked_for_where_the_file_says(slurm_cluster, stored, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", str(slurm_cluster.config_file))
    assert default_run_root() == Path("runs")
    assert init_site(monkeypatch, "--yes", "--no-srun", "--run-root", str(tmp_path / "mine")) == 0
    assert default_run_root() == tmp_path / "mine"
    monkeypatch.setenv("SLURM_CONF", "/no such file")
    assert default_run_root() == Path("runs")


def test_a_printed_file_is_all_of_the_output(slurm_cluster, stored, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SLURM_CONF", str(slurm_cluster.config_file))
    assert init_site(monkeypatch, "--yes", "--print", "--no-srun") == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert cluster_of(tmp_path / "printed.yaml").name == "test"
    assert not stored.exists()


def test_accounts_that_sacctmgr_does_not_tell_are_asked_for(
    strict, stored, monkeypatch, tmp_path, capsys
):
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sacctmgr").write_text("#!/bin/sh\necho 'error: Access denied' >&2; exit 1\n")
    (programs / "sacctmgr").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    assert init_site(monkeypatch, "--no-srun", answers="\nbiology\n\n\n") == 0
    assert "SLURM does not tell your accounts: sacctmgr" in capsys.readouterr().out
    assert cluster_of(stored / "strict.yaml").account == "biology"
