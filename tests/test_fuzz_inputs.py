"""Hundreds of inputs from scripts/fuzz_inputs.py: each is used, or refused in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPO_ROOT = Path(__file__).parents[1]


def test_random_inputs_are_used_or_refused_in_one_line() -> None:
    command = [sys.executable, "scripts/fuzz_inputs.py", "--count", "300", "--kinds", "text", "jsonl", "checkpoints"]
    environment = {**os.environ, "PYTHONPATH": str(REPO_ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=REPO_ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    results = json.loads(process.stdout.splitlines()[-1])
    assert results["failures"] == 0
    assert results["inputs"] >= 200
    # Both outcomes must occur, or the inputs do not vary.
    assert {"text: used", "text: refused", "checkpoint: refused"} <= set(results["outcomes"])
