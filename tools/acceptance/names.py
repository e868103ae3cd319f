"""The names of a site that its report must not say, and how they are taken out of a text."""

import getpass
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.cluster_env import slurm_says
from nanoslime.config.cluster import ClusterConfig

_NUMBER = r"\d{1,3}"
_ADDRESS = re.compile(rf"\b{_NUMBER}(?:\.{_NUMBER}){{3}}(?::\d+)?\b")
_PATH = re.compile(r"(?<![\w<])(?:~|\.{0,2})(?:/[^\s:;,'\"()\[\]]+)+/?")
# Tokens and keys are long words of letters and digits.
_SECRET = re.compile(r"\b(?:hf_\w{8,}|(?=\w*\d)[A-Za-z0-9_]{28,})\b")
_MAIL = re.compile(r"\b[\w.+-]+@[\w.-]+\b")
# SLURM's reason for a job that waits: ReqNodeNotAvail,_UnavailableNodes:gpu[001-004].
_UNAVAILABLE = re.compile(r"(?<=Nodes:)[^\s);]+")
_HOST_LIST = re.compile(r"\b[A-Za-z][\w.-]*\[\d[\d,-]*\][\w.-]*")
# Words that are too short to be taken out wherever they stand.
_MIN_NAME = 2
# SLURM's and our default, which name no site and begin the names of our fields.
_OF_NO_SITE = ("cluster", "local")
_FIELDS = (
    *("name", "account", "partition", "qos", "reservation", "nodelist", "exclude", "share"),
    *("comment", "mail_user"),
)
# What else sbatch takes these from: extra options, and the environment.
_OPTIONS = ("account", "A", "partition", "p", "qos", "q", "reservation", "nodelist", "w")
_VARIABLES = ("ACCOUNT", "PARTITION", "QOS", "RESERVATION")


@dataclass(slots=True)
class Names:
    # Host names, which may be followed by a domain wherever they stand.
    hosts: set[str] = field(default_factory=set)
    words: set[str] = field(default_factory=set)

    def pattern(self) -> re.Pattern[str]:
        """What finds all of them as whole words, the longest first."""
        domains = {host.partition(".")[2] for host in self.hosts}
        hosts = self.hosts | {host.partition(".")[0] for host in self.hosts}
        of_domain = rf"(?:[\w-]+\.)*{_one_of({name for name in domains if '.' in name})}"
        of_host = rf"{_one_of(hosts)}(?:\.[\w-]+)*"
        return re.compile(
            rf"(?<![\w<])(?:{of_host}|{of_domain}|{_one_of(self.words)})(?![\w>])", re.IGNORECASE
        )


def _one_of(names: set[str]) -> str:
    kept = {name for name in names if len(name) >= _MIN_NAME and name not in _OF_NO_SITE}
    if not kept:
        # It matches nothing.
        return "(?!)"
    return f"(?:{'|'.join(re.escape(name) for name in sorted(kept, key=len, reverse=True))})"


def of_site(cluster: ClusterConfig, *, has_slurm: bool) -> Names:
    """This machine, this user, and what the cluster file and SLURM say of the cluster."""
    hosts = {socket.gethostname(), socket.getfqdn()}
    words = {getpass.getuser(), Path.home().name}
    for name in _FIELDS:
        words |= _parts(str(getattr(cluster, name)))
    for option in _OPTIONS:
        words |= _parts(str(cluster.extra_sbatch.get(option, "")))
    for variable in _VARIABLES:
        for prefix in ("SBATCH", "SLURM"):
            words |= _parts(os.environ.get(f"{prefix}_{variable}", ""))
    if has_slurm:
        hosts |= _nodes()
        for line in slurm_says("scontrol", "show", "config").splitlines():
            key, _, value = line.partition("=")
            if key.strip() == "ClusterName":
                words.add(value.strip())
            elif key.strip().startswith(
                ("SlurmctldHost", "ControlMachine", "AccountingStorageHost")
            ):
                hosts.add(value.strip().partition("(")[0])
    return Names(hosts, words)


def _nodes() -> set[str]:
    """What all nodes are called: by SLURM, by themselves, and in the network."""
    listed = slurm_says("sinfo", "--all", "--noheader", "--Node", "--format=%N %n %o")
    return {name for name in listed.split() if not name.replace(".", "").isdigit()}


def _parts(value: str) -> set[str]:
    """The names in a list of them."""
    return {value, *value.split(",")}


def scrub(text: str, hidden: re.Pattern[str]) -> str:
    """The text without paths, addresses, secrets, and what `hidden` finds."""
    for pattern, word in (
        (_MAIL, "<mail>"),
        (_PATH, "<path>"),
        (_ADDRESS, "<address>"),
        (_SECRET, "<secret>"),
        (_UNAVAILABLE, "<nodes>"),
        (_HOST_LIST, "<nodes>"),
        (hidden, "<name>"),
    ):
        text = pattern.sub(word, text)
    return text


def scrubbed(content: Any, hidden: re.Pattern[str]) -> Any:
    """The same of all texts in what is to be JSON."""
    if isinstance(content, dict):
        return {key: scrubbed(value, hidden) for key, value in content.items()}
    if isinstance(content, Sequence) and not isinstance(content, str):
        return [scrubbed(value, hidden) for value in content]
    return scrub(content, hidden) if isinstance(content, str) else content
