"""A report may leave the site: it names no host, user, path, address or secret."""

import getpass
import json
import re
import socket
from pathlib import Path

import pytest

from tools.acceptance.checks import FAILED_CHECK, PASSED, Check
from tools.acceptance.report import Outcome, Report, scrub
from tools.acceptance.rungs import Rung

RUNG = Rung("two-nodes", "two nodes: Megatron TP 2", 2, {})
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
    report = Report([failed], names={"gpu-node07"}, code={"commit": "0123456789ab"})
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
    assert scrub(text, ["n1", "root"]) == text


def test_names_are_whole_words_and_the_longest_go_first():
    assert scrub("n1 n10 n1-ib inn1", ["n10", "n1"]) == "<name> <name> <name>-ib inn1"


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
