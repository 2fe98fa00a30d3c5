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

    def __init__(self, at: Path, *options: str, **environment: str) -> None:
        own = os.environ | {"PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1"} | environment
        command = [sys.executable, "-m", "memtx", "serve", "--checkpoint", str(at / "model"), "--port", "0"]
        self.process = subprocess.Popen(
            [*command, "--segment-length", "32", *options], cwd=at, env=own, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        self.said = self.process.stderr.readline()
        found = re.search(r"http://\S+", self.said)
        assert found, self.said + self.process.stderr.read()
        self.address = found[0]

    def end(self, how: int = signal.SIGTERM) -> None:
        """Send a signal and wait for the end."""
        self.process.send_signal(how)
        self.process.wait(30)
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model in it."""
    at = tmp_path_factory.mktemp("served")
    pretrained(at / "model")
    return at


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Server]:
    pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
    made = Server(place)
    yield made
    made.end()
