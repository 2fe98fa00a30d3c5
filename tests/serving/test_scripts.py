"""The load and the fuzz at a tiny size, and what the server's own description says, tried out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.serving.conftest import HOME, Server

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")


def run(name: str, server: Server, *options: str, at: Path) -> Any:
    command = [sys.executable, str(HOME / "scripts" / name), server.address, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=at)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_sessions_under_load_are_not_mixed_up(server: Server, tmp_path: Path) -> None:
    options = ("--num-sessions", "8", "--duration", "2", "--num-words", "60", "--json", "-")
    found = run("load_sessions.py", server, *options, at=tmp_path)
    assert (found["errors"], found["mismatches"]) == (0, 0)
    assert found["latency_ms"]["feed"]["n"] >= 8
    assert found["latency_ms"]["feed"]["p50"] <= found["latency_ms"]["feed"]["p99"]


def test_tampered_sessions_are_refused(server: Server, tmp_path: Path) -> None:
    found = run("fuzz_sessions.py", server, "--count", "60", at=tmp_path)
    mutations = ("truncate", "flip_bit", "overwrite_with_noise", "append_bytes", "change_model", "inject_pickle")
    assert found["refused"] == {**dict.fromkeys(mutations, 10), "names": 64}
    assert found["alive"]
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow
def test_the_description_is_tried_out(server: Server, tmp_path: Path) -> None:
    pytest.importorskip("schemathesis", reason="the package 'schemathesis' is not installed")
    command = [
        "-m", "schemathesis.cli", "run", f"{server.address}/openapi.json", "--url", server.address,
        "--checks", "not_a_server_error", "--max-examples", "30", "--phases", "examples,coverage,fuzzing",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=tmp_path, timeout=250)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
