"""What every test shares: environment, `--require-slurm`, a real SLURM, no leftovers."""

import math
import os
import shutil
import uuid
from collections.abc import Iterator
from multiprocessing import resource_tracker

import pytest

from tests import process_table
from tests.slurm.accounting import Accounting
from tests.slurm.cluster import SlurmCluster

_REQUIRED_MARKS = ("slurm", "sglang", "ray", "megatron")
_NO_DATABASE = "no {} on this machine: `bash env/install_slurm.sh` installs slurmdbd and MariaDB"
_NO_SLURM = "no slurmctld on this machine: `bash env/install_slurm.sh` installs SLURM"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-slurm",
        action="store_true",
        help=f"a skipped module, or skipped test marked {', '.join(_REQUIRED_MARKS)}, is a failure",
    )


def pytest_configure() -> None:
    process_table.adopt_orphans()
    os.environ["PATH"] += ":/usr/sbin:/sbin"  # where Debian puts slurmctld


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if shutil.which("slurmctld") is None:
        for item in items:
            if item.get_closest_marker("slurm"):
                item.add_marker(pytest.mark.skip(reason=_NO_SLURM))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    is_required = any(item.get_closest_marker(mark) for mark in _REQUIRED_MARKS)
    if is_required and item.config.option.require_slurm:
        _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    report = yield
    if collector.config.option.require_slurm:
        _refuse_skip(report)
    return report


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip into a failure; an expected failure (xfail) is not a skip."""
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr
    if isinstance(reason, tuple):
        _, _, reason = reason
    report.outcome = "failed"
    report.longrepr = f"{report.nodeid}: skipped although --require-slurm forbids it: {reason}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    num_skipped = sum(_NO_SLURM in str(report.longrepr) for report in skipped)
    if num_skipped:
        terminalreporter.write_line(f"{num_skipped} SLURM tests skipped: {_NO_SLURM}", yellow=True)
    for kind in ("parity", "resume"):
        _print_differences(terminalreporter, kind)


def _print_differences(terminalreporter: pytest.TerminalReporter, kind: str) -> None:
    """A table of what tests recorded as `kind`: of each layout the largest differences.

    A record is (layout, differences by quantity).
    """
    runs_of: dict[str, list[dict[str, float]]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in report.user_properties:
                if name == kind:
                    layout, differences = value
                    runs_of.setdefault(layout, []).append(differences)
    if not runs_of:
        return
    first_runs = next(iter(runs_of.values()))
    quantities = list(first_runs[0])
    terminalreporter.write_line(f"| {kind}: layout (runs) | {' | '.join(quantities)} |")
    terminalreporter.write_line("|" + "---|" * (len(quantities) + 1))
    for layout, runs in runs_of.items():
        cells = [_cell(max(run[quantity] for run in runs)) for quantity in quantities]
        terminalreporter.write_line(f"| {layout} ({len(runs)}) | {' | '.join(cells)} |")


def _cell(difference: float) -> str:
    if math.isnan(difference):
        return "-"
    return f"{difference:.1e}".replace("e-0", "e-")


@pytest.fixture(scope="session")
def slurm_session() -> Iterator[SlurmCluster]:
    with SlurmCluster() as cluster:
        yield cluster


@pytest.fixture
def slurm_cluster(
    slurm_session: SlurmCluster, request: pytest.FixtureRequest
) -> Iterator[SlurmCluster]:
    """Four idle nodes of two CPUs.

    After a test its jobs are cancelled, and the nodes that it killed come back.
    """
    failed_before = request.session.testsfailed
    yield slurm_session
    if request.session.testsfailed > failed_before:
        print(slurm_session.log_tails())
    slurm_session.reset()


@pytest.fixture(scope="session")
def strict_session() -> Iterator[SlurmCluster]:
    for program in ("slurmdbd", "mariadbd", "mariadb-install-db"):
        if shutil.which(program) is None:
            pytest.skip(_NO_DATABASE.format(program))
    with SlurmCluster(
        cluster_name="strict",
        cpus_per_node=96,
        gpus_per_node=8,
        gpu_types=("h100",),
        mem_per_node_mb=1_400_000,
        partitions=("short Default=YES MaxTime=30", "long Nodes=n[1-2] MaxTime=240 GraceTime=60"),
        settings={
            "EnforcePartLimits": "NO",
            "JobRequeue": "0",
            "AccountingStorageTRES": "gres/gpu,gres/gpu:h100",
        },
        accounting=Accounting(
            accounts=("physics", "biology"),
            foreign_accounts=("chemistry",),
            qos=("high",),
            foreign_qos=("vip",),
        ),
    ) as cluster:
        yield cluster


@pytest.fixture
def strict_slurm(strict_session: SlurmCluster) -> Iterator[SlurmCluster]:
    """A site as they are: four idle nodes of 96 CPUs, 1,400,000 MB and eight typed GPUs (h100).

    Partition short (default, all nodes) allows 30 minutes, long (n1 and n2) 240 and gives 60 s of
    grace; limits are not enforced at submission (EnforcePartLimits=NO), and jobs are not requeued
    by default. Accounts are enforced: the user has physics (default) and biology, not chemistry;
    QOS normal and high, not vip. It starts in some seconds, once a session. What a job of it says
    of CPUs and GPUs is not there in fact.
    """
    yield strict_session
    strict_session.reset()


@pytest.fixture
def no_leftovers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail when a process that started during the test is alive 5 s after it, and end that process.

    This counts every new descendant of the test session, daemons included, and every process with
    the test's environment, which SLURM jobs inherit. It does not count processes that servers from
    before the test start for themselves. Ask for a session's servers (SLURM, Ray, SGLang) before
    this fixture.
    """
    marker = uuid.uuid4().hex
    # Python's own tracker would otherwise be started by the first shared object.
    resource_tracker.ensure_running()
    earlier = process_table.descendants(os.getpid(), process_table.all_processes())
    before = {process.pid for process in earlier}
    monkeypatch.setenv("NANOSLIME_TEST_MARKER", marker)
    yield

    def leftovers() -> set[process_table.Process]:
        now = process_table.all_processes()
        marked = {p for p in now.values() if p.has_env("NANOSLIME_TEST_MARKER", marker)}
        return marked | process_table.descendants(os.getpid(), now, stop_at=before)

    if not process_table.wait_for(lambda: not leftovers(), timeout_s=5.0, interval_s=0.2):
        left = leftovers()
        report = [f"{p.pid}: {p.command}" for p in left]
        process_table.end(left)
        pytest.fail("processes left behind by this test:\n" + "\n".join(report), pytrace=False)
