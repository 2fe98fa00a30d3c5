"""Settings and data folders shared by all tests."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from memtx.cli.main import shorten_openmp_spin

shorten_openmp_spin(os.environ)  # before torch is loaded, as the commands do

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

# A process started in the background of a shell ignores Ctrl-C, and so would the processes that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(scope="session")
def books() -> Path:
    """Return the folder of real books, or skip."""
    root = os.environ.get("MEMTX_DATA")
    if root is None or not (folder := Path(root) / "pg19-mini").is_dir():
        pytest.skip("MEMTX_DATA is not a folder that contains pg19-mini")
    return folder


@pytest.fixture(scope="session")
def parity() -> Path:
    """Return the folder of reference checkpoints with inputs and outputs, or skip."""
    root = os.environ.get("MEMTX_PARITY")
    if root is None or not Path(root).is_dir():
        pytest.skip("MEMTX_PARITY is not a folder of reference checkpoints")
    return Path(root)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name every skipped test under its reason, so that none is missing without notice."""
    reports = terminalreporter.stats.get("skipped", [])
    tests_by_reason: dict[str, list[str]] = {}
    for report in reports:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        tests_by_reason.setdefault(reason.removeprefix("Skipped: "), []).append(report.nodeid)
    terminalreporter.section(f"{len(reports)} skipped tests")
    for reason, names in sorted(tests_by_reason.items()):
        terminalreporter.write_line(f"{len(names)}: {reason}")
        for name in sorted(names):
            terminalreporter.write_line(f"    {name}")


settings.register_profile("memtx", deadline=None, max_examples=15, derandomize=True, print_blob=True)
settings.load_profile("memtx")
