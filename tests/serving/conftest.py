from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import memtx
from tests.commands.tiny import pretrained

HOME = Path(memtx.__file__).parent.parent


class Server:
    """`memtx serve` as a child process."""

    def __init__(self, workdir: Path, *options: str) -> None:
        environment = os.environ | {"PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "memtx", "serve", "--checkpoint", "model", "--port", "0"]
        command += ["--segment-length", "32", *options]
        self.process = subprocess.Popen(command, cwd=workdir, env=environment, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        # Other lines may come first, such as that on the window.
        lines: list[str] = []
        while not (match := re.search(r"http://\S+", "".join(lines))):
            lines.append(self.process.stderr.readline())
            assert lines[-1], "".join(lines)
        self.address = match[0]

    def end(self, signal_number: int = signal.SIGTERM) -> None:
        """Send a signal and wait for the end."""
        self.process.send_signal(signal_number)
        self.process.wait(30)
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model."""
    path = tmp_path_factory.mktemp("served")
    pretrained(path / "model")
    return path


@pytest.fixture(scope="module")
def server(workdir: Path) -> Iterator[Server]:
    pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
    process = Server(workdir)
    yield process
    process.end()
