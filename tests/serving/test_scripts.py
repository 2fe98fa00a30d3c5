"""Load and fuzz scripts at a tiny size, and requests generated from the OpenAPI description."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.serving.conftest import HOME, Server

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")


def run(name: str, server: Server, *options: str, workdir: Path) -> Any:
    command = [sys.executable, str(HOME / "scripts" / name), server.address, *options]
    result = subprocess.run(command, capture_output=True, text=True, cwd=workdir)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout)


def test_sessions_under_load_are_not_mixed_up(server: Server, tmp_path: Path) -> None:
    options = ("--num-sessions", "8", "--duration", "2", "--num-words", "60", "--num-short", "2", "--json", "-")
    report = run("load_sessions.py", server, *options, workdir=tmp_path)
    assert (report["errors"], report["mismatches"]) == (0, 0)
    assert report["latency_ms"]["feed"]["n"] >= 8
    assert report["latency_ms"]["feed"]["p50"] <= report["latency_ms"]["feed"]["p99"]
    assert report["latency_ms"]["short feed"]["n"] >= 2
    assert report["full_load_ms"] > 0


def test_a_prompt_is_read_once(server: Server, tmp_path: Path) -> None:
    report = run(
        "measure_prefix_cache.py", server, "--num-words", "60", "--num-prompts", "2", "--json", "-", workdir=tmp_path
    )
    assert report["new prompt"]["cached_tokens"] == 0
    assert report["same prompt"]["cached_tokens"] == report["same prompt"]["tokens"] > 100
    assert report["other question"]["cached_tokens"] > 100
    assert report["snapshots"]["bytes_each"] > 0


def test_tampered_sessions_are_refused(server: Server, tmp_path: Path) -> None:
    report = run("fuzz_sessions.py", server, "--count", "60", workdir=tmp_path)
    mutations = ("truncate", "flip_bit", "overwrite_with_noise", "append_bytes", "change_model", "inject_pickle")
    assert report["refused"] == {**dict.fromkeys(mutations, 10), "names": 64}
    assert report["alive"]
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow
def test_requests_of_the_openapi_description_cause_no_server_error(server: Server, tmp_path: Path) -> None:
    pytest.importorskip("schemathesis", reason="the package 'schemathesis' is not installed")
    command = [
        "-m", "schemathesis.cli", "run", f"{server.address}/openapi.json", "--url", server.address,
        "--checks", "not_a_server_error", "--max-examples", "30", "--phases", "examples,coverage,fuzzing",
    ]  # fmt: skip
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=tmp_path, timeout=250)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
