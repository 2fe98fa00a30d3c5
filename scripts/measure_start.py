"""Measure the startup time of the command line, Python itself and a bare `import torch`: medians in seconds.

python scripts/measure_start.py [--repeats 5] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

from benchmarking import add_size_options
from training_runs import memtx_environment

COMMANDS = {
    "python -c pass": ["-c", "pass"], "memtx --help": ["-m", "memtx", "--help"],
    "memtx --version": ["-m", "memtx", "--version"], "memtx read --help": ["-m", "memtx", "read", "--help"],
    'python -c "import torch"': ["-c", "import torch"],
    'python -c "import lightning.pytorch.cli"': ["-c", "import lightning.pytorch.cli"],
    "memtx fit --help": ["-m", "memtx", "fit", "--help"],
}  # fmt: skip


def time_command(arguments: list[str]) -> float:
    """Return the wall time of a fresh interpreter."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, env=memtx_environment(), capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size_options(parser, repeats=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    arguments = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for command in COMMANDS.values():
        time_command(command)  # The first call reads from disk and may write bytecode.
    # In turns, so that a slow minute of the machine affects all alike.
    for _ in range(arguments.repeats):
        for name, command in COMMANDS.items():
            times[name].append(time_command(command))
    medians = {name: statistics.median(values) for name, values in times.items()}
    if arguments.json:
        print(json.dumps(medians))
        return
    print("| command | median s | range of", arguments.repeats, "|\n|---|---|---|")
    for name, value in medians.items():
        print(f"| `{name}` | {value:.3f} | {min(times[name]):.3f} to {max(times[name]):.3f} |")


if __name__ == "__main__":
    main()
