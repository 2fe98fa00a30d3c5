"""How long the command line takes to answer, beside Python itself and a bare `import torch`: medians in seconds.

python scripts/measure_start.py [--repeats 5] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "memtx --help": ["-m", "memtx", "--help"],
    "memtx --version": ["-m", "memtx", "--version"],
    "memtx read --help": ["-m", "memtx", "read", "--help"],
    'python -c "import torch"': ["-c", "import torch"],
    'python -c "import lightning.pytorch.cli"': ["-c", "import lightning.pytorch.cli"],
    "memtx fit --help": ["-m", "memtx", "fit", "--help"],
}
REPO_ROOT = Path(__file__).resolve().parent.parent


def time_command(arguments: list[str]) -> float:
    """Return the wall time of one fresh interpreter."""
    began = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(REPO_ROOT)}
    subprocess.run([sys.executable, *arguments], check=True, env=environment, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    arguments = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for command in COMMANDS.values():
        time_command(command)  # The first call reads from disk and may write bytecode.
    # In turns, so that a slow minute of the machine falls on all of them.
    for _ in range(arguments.repeats):
        for name, command in COMMANDS.items():
            times[name].append(time_command(command))
    medians = {name: statistics.median(values) for name, values in times.items()}
    if arguments.json:
        print(json.dumps(medians))
        return
    print("| command | median s | of", arguments.repeats, "|\n|---|---|---|")
    for name, value in medians.items():
        print(f"| `{name}` | {value:.3f} | {min(times[name]):.3f} to {max(times[name]):.3f} |")


if __name__ == "__main__":
    main()
