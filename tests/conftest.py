"""What every test shares: environment, `--require-slurm`, a real SLURM, no leftovers."""

import math
import os
import shutil
import uuid
from collections.abc import Iterator
from multiprocessing import resource_tracker

import pytest

from tests import process_table
from tests.slurm.cluster import SlurmCluster

# Before any test module imports torch or transformers.
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")

_REQUIRED_MARKS = ("slurm", "sglang", "ray", "megatron")
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
    required = any(item.get_closest_marker(mark) for mark in _REQUIRED_MARKS)
    return _refuse_skip(report) if required and item.config.option.require_slurm else report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    report = yield
    return _refuse_skip(report) if collector.config.option.require_slurm else report


def _refuse_skip(report):
    """Turn a skip into a failure; an expected failure (xfail) is not a skip."""
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid}: skipped although --require-slurm forbids it: {reason}"
    return report


def pytest_terminal_summary(terminalreporter) -> None:
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if _NO_SLURM in str(r.longrepr)]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} SLURM tests skipped: {_NO_SLURM}", yellow=True)
    for kind in ("parity", "resume"):
        _differences(terminalreporter, kind)


def _differences(terminalreporter, kind: str) -> None:
    """What tests recorded as `kind`, (a layout, differences by quantity): the largest of each layout."""
    reports = [
        r for outcome in ("passed", "failed") for r in terminalreporter.stats.get(outcome, [])
    ]
    recorded = [value for r in reports for name, value in r.user_properties if name == kind]
    rows: dict[str, list[dict[str, float]]] = {}
    for layout, differences in recorded:
        rows.setdefault(layout, []).append(differences)
    for number, (layout, runs) in enumerate(rows.items()):
        if not number:
            names = list(runs[0])
            terminalreporter.write_line(
                f"| {kind}: layout (runs) | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}"
            )
        largest = [max(run[name] for run in runs) for name in names]
        cells = [
            "-" if math.isnan(value) else f"{value:.1e}".replace("e-0", "e-") for value in largest
        ]
        terminalreporter.write_line(f"| {layout} ({len(runs)}) | {' | '.join(cells)} |")


@pytest.fixture(scope="session")
def slurm_session() -> Iterator[SlurmCluster]:
    with SlurmCluster() as cluster:
        yield cluster


@pytest.fixture
def slurm_cluster(
    slurm_session: SlurmCluster, request: pytest.FixtureRequest
) -> Iterator[SlurmCluster]:
    """Four idle nodes of two CPUs; after a test its jobs are cancelled and nodes it killed come back."""
    failed_before = request.session.testsfailed
    yield slurm_session
    if request.session.testsfailed > failed_before:
        print(slurm_session.log_tails())
    slurm_session.reset()


@pytest.fixture
def no_leftovers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail when a process that started during the test is still alive 5 s after it, and end that process.

    Counted: every new descendant of the test session, daemons included, and every process with the test's
    environment, which SLURM jobs inherit. Not counted: what servers started before the test start for
    themselves. Ask for a session's servers (SLURM, Ray, SGLang) before this fixture.
    """
    marker = uuid.uuid4().hex
    resource_tracker.ensure_running()  # Python's own; otherwise the first shared object would start it
    before = {
        process.pid
        for process in process_table.descendants(os.getpid(), process_table.all_processes())
    }
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
