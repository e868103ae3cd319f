"""Which stored file is that of the cluster on which a command is typed."""

from pathlib import Path

import pytest

from nanoslime.types import RunError
from tools.submit import grpo as submit_grpo
from tools.submit import sites


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "config/nanoslime/clusters"
    folder.mkdir(parents=True)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return folder


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a scontrol into PATH whose script is given, and returns the environment to look in."""

    def put(script: str) -> dict[str, str]:
        programs = tmp_path / "bin"
        programs.mkdir(exist_ok=True)
        (programs / "scontrol").write_text(f"#!/bin/sh\n{script}\n")
        (programs / "scontrol").chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
        return {"PATH": str(programs), "XDG_CONFIG_HOME": str(tmp_path / "config")}

    return put


def test_slurm_is_not_asked_where_no_file_is_stored(stored, scontrol, tmp_path):
    environ = scontrol(f"touch {tmp_path}/asked")
    assert sites.of_this_machine(environ) is None
    assert not (tmp_path / "asked").exists()


def test_the_file_is_the_one_by_the_name_that_slurm_says(stored, scontrol):
    environ = scontrol("echo 'ClusterName             = alps'")
    (stored / "rhine.yaml").write_text("gpus_per_node: 8\n")
    assert sites.of_this_machine(environ) is None
    (stored / "alps.yaml").write_text("gpus_per_node: 8\n")
    assert sites.of_this_machine(environ) == stored / "alps.yaml"


def test_without_slurm_nothing_is_searched(stored, tmp_path):
    (stored / "alps.yaml").write_text("gpus_per_node: 8\n")
    environ = {"PATH": str(tmp_path), "XDG_CONFIG_HOME": str(stored.parents[1])}
    assert sites.of_this_machine(environ) is None


def test_a_silent_slurm_is_no_reason_to_plan_without_the_file(stored, scontrol):
    environ = scontrol("echo 'slurm_load_ctl_conf error: Unable to contact' >&2; exit 1")
    (stored / "alps.yaml").write_text("gpus_per_node: 8\n")
    with pytest.raises(RunError, match="name one of alps by --cluster, or add --local"):
        sites.of_this_machine(environ)


def test_a_cluster_by_name_is_the_users_before_ours(stored, capsys):
    (stored / "h200.yaml").write_text("name: mine\n")
    flags = ["--nodes", "4", "--local", "--dry-run", "--cluster"]
    assert submit_grpo.main([*flags, "h200"], {"PATH": ""}, stored) == 0
    assert f"cluster   mine, as {stored / 'h200.yaml'} says" in capsys.readouterr().out
    assert submit_grpo.main([*flags, "other"], {"PATH": ""}, stored) == 2
    assert "other: no such file, and not one of h200" in capsys.readouterr().err
