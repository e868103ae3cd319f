"""A report may leave the site: it names no host, user, path, address or secret."""

import getpass
import json
import re
import socket
import time
from pathlib import Path

import pytest

from nanoslime.config import ClusterConfig
from tools.acceptance import names
from tools.acceptance.checks import FAILED_CHECK, PASSED, Check
from tools.acceptance.names import Names, scrub
from tools.acceptance.report import Outcome, Report
from tools.acceptance.rungs import Rung

RUNG = Rung("two-nodes", "two nodes: Megatron TP 2", 2, {})
OWN = names.of_site(ClusterConfig(), has_slurm=False)
SECRET = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz0123456789"
KEY = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b"
LEAK = (
    f"no heartbeat from gpu-node07 (node 1) for 90 s; see {Path.home()}/runs/it's/agent-1.log: "
    f"{getpass.getuser()}@{socket.gethostname()} at 10.20.30.40:6379 with {SECRET} and {KEY}; "
    "~/.cache/x ../y/z and file=/scratch/p/q,r"
)


def test_what_a_failed_rung_tells_is_scrubbed():
    check = Check("save", FAILED_CHECK, LEAK, {"path": LEAK, "sizes": [LEAK, 7]})
    failed = Outcome(RUNG, "failed", LEAK, 12.0, [check])
    report = Report(
        [failed],
        hidden=Names(hosts={"gpu-node07"} | OWN.hosts, words=OWN.words),
        code={"commit": "0123456789ab"},
    )
    for text in (report.text(), json.dumps(report.content())):
        hidden = ["gpu-node07", "10.20.30.40", SECRET, KEY, "scratch", "/runs", ".cache", "y/z"]
        hidden += [str(Path.home()), socket.gethostname()]
        for word in hidden:
            assert word not in text
        assert not re.search(rf"\b{re.escape(getpass.getuser())}\b", text)
        assert "no heartbeat from <name> (node 1) for 90 s" in text
    assert report.content()["commit"] == "0123456789ab"
    assert not report.is_good


@pytest.mark.parametrize(
    "text",
    [
        "logprobs differ by 1.9e-07 in the mean (bound 0.0001), float32",
        "all-reduce 12.5 GB/s, send/receive 3.2 GB/s",
        "one node: Megatron TP 2 x PP 2 took 12.3 s",
        "torch 2.9.1+cpu, megatron-core 0.16.0",
    ],
)
def test_figures_stay_as_they_are(text):
    assert scrub(text, Names({"n1", "login.site.org"}, {"root"}).pattern()) == text


def test_names_are_whole_words_and_the_longest_go_first():
    hidden = Names({"n10", "n1"}).pattern()
    assert scrub("n1 n10 n1-ib inn1", hidden) == "<name> <name> <name>-ib inn1"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "waited for 5 min (ReqNodeNotAvail,_UnavailableNodes:gpu[001-004,9],x2); try",
            "waited for 5 min (ReqNodeNotAvail,_UnavailableNodes:<nodes>); try",
        ),
        ("Invalid node name specified: gpu[001-004]-ib.site.org.", "name specified: <nodes>"),
        ("gpu-7.cluster.example.org, GPU-7.hpc", "<name>, <name>"),
        ("login3.site.example.org does not answer", "<name> does not answer"),
        ("cluster.max_requeues=2 and lab42", "cluster.max_requeues=2 and <name>"),
        ("the partition's limit, lab42.5", "the partition's limit, <name>.5"),
    ],
)
def test_what_slurm_and_the_network_call_nodes_is_taken_out(text, wanted):
    hosts = {"gpu-7", "login1.site.example.org"}
    found = scrub(text, Names(hosts, {"lab42", "cluster", "local", "a", ""}).pattern())
    assert wanted in found
    assert "gpu" not in found.lower() and "example" not in found


def test_the_names_of_a_site_are_known_before_a_job_has_run(tmp_path, monkeypatch):
    said = {
        "sinfo": "echo 'cn-1 cn-1 cn-1-bmc'; echo 'cn-2 host2.site.org 10.1.1.2'",
        "scontrol": "echo 'ClusterName             = deepthought'; "
        "echo 'SlurmctldHost[0]        = ctl9(10.0.0.1)'",
    }
    for name, line in said.items():
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{line}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SBATCH_QOS", "urgent7")
    cluster = ClusterConfig(
        name="mysite",
        partition="hopper,ampere",
        account="prj-55",
        qos="gold",
        share="team-x",
        extra_sbatch={"reservation": "spring-school"},
    )
    hidden = names.of_site(cluster, has_slurm=True)
    leaks = ["cn-1", "cn-1-bmc", "cn-2", "host2", "host2.site.org", "deepthought", "ctl9"]
    leaks += ["mysite", "hopper", "ampere", "prj-55", "gold", "team-x", "spring-school", "urgent7"]
    assert scrub(" ".join(leaks), hidden.pattern()) == " ".join(["<name>"] * len(leaks))


def test_the_ladders_own_words_stay_where_a_site_has_them_as_names():
    report = Report([Outcome(RUNG, "failed", "no answer of nodes")], hidden=Names({"nodes", "two"}))
    assert report.text() == (
        "FAILED at two nodes: Megatron TP 2, after 0 rungs that passed\n\n"
        "FAILED      two nodes: Megatron TP 2: no answer of <name>\n"
    )
    assert report.content()["rungs"][0]["rung"] == "two-nodes"


def test_thousands_of_names_take_no_time():
    hosts = {f"node{number:05d}.site.org" for number in range(8000)}
    hidden = Names(hosts).pattern()
    begin = time.process_time()
    text = "the driver of node07999 lost node00001.site.org and inode00001\n" * 50
    assert scrub(text, hidden).count("<name>") == 100
    assert time.process_time() - begin < 5.0


def test_a_ladder_says_how_far_it_came():
    good = [Check("steps", PASSED, "3 of 3")]
    low = Rung("one", "one slot", 1, {})
    passed = Outcome(low, "passed", "", 5.0, good)
    early = Outcome(RUNG, "impossible", "it takes 2 nodes, and there are 1")
    assert Report([passed]).verdict() == "passed all 1 rungs"
    text = Report([passed, early]).text()
    assert text.startswith("passed 1 rungs; the ladder ends early before two nodes")
    assert Report([passed, early]).is_good
    failed = Report([passed, Outcome(RUNG, "failed", "parity: far off")])
    assert failed.verdict() == "FAILED at two nodes: Megatron TP 2, after 1 rungs that passed"
