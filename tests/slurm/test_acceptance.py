"""The ladder of a first hour on a real SLURM, with the tiny model, Megatron and SGLang."""

import getpass
import json
import socket
from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster
from tools.acceptance import command

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.ray,
    pytest.mark.sglang,
    pytest.mark.megatron,
    pytest.mark.matrix,
]
_JUDGED = ("steps", "parity", "sync", "save", "kill and resume")


@pytest.mark.timeout(4200)
def test_all_rungs_pass_and_the_report_names_nobody(
    slurm_cluster: SlurmCluster, no_leftovers: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(slurm_cluster.config_file))
    words = ["--run-root", str(tmp_path / "runs"), "--report", str(tmp_path / "report")]
    code = command.main([*words, "--cluster.submit", "sbatch"])
    text = (tmp_path / "report" / "acceptance.txt").read_text()
    assert code == 0, text
    content = json.loads((tmp_path / "report" / "acceptance.json").read_text())
    assert [rung["state"] for rung in content["rungs"]] == ["passed"] * 6
    for rung in content["rungs"]:
        outcomes = {check["name"]: check["outcome"] for check in rung["checks"]}
        assert {name: outcomes[name] for name in _JUDGED} == dict.fromkeys(_JUDGED, "passed")
        assert outcomes["bandwidth"] == ("passed" if rung["nodes"] > 1 else "not judged")
    for told in (text, json.dumps(content)):
        for name in (str(tmp_path), socket.gethostname(), *slurm_cluster.node_names, "127.0."):
            assert name not in told.split() and f"/{name}" not in told
        assert f"{getpass.getuser()}@" not in told and "/tmp/" not in told
