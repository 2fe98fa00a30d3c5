"""A few hundred of the inputs that scripts/fuzz_inputs.py draws: each is used, or refused in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HOME = Path(__file__).parents[1]


def test_what_nobody_means_is_used_or_refused_in_one_line() -> None:
    command = [sys.executable, "scripts/fuzz_inputs.py", "--count", "300", "--kinds", "text", "jsonl", "checkpoints"]
    environment = {**os.environ, "PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=HOME, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["failures"] == 0
    assert found["inputs"] >= 200
    # All refused, or all taken, would say that nothing was drawn.
    assert {"text: used", "text: refused", "checkpoint: refused"} <= set(found["outcomes"])
