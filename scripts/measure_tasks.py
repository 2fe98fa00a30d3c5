"""What the shipped tasks' configs reach from scratch, seed by seed: figures on the test examples, and seconds.

    python scripts/measure_tasks.py --data FOLDER [--tasks movie-reviews conll2000 rte squad2] [--seeds 0 1 2]
        [--output-dir runs/tasks]

FOLDER holds a folder of examples for each task, named like its config. Each run is `memtx fit` and `memtx test`, as a
user would start them.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parent.parent
TASKS = ("movie-reviews", "conll2000", "rte", "squad2")
METRIC_PATTERN = re.compile(r"(test_\w+)\s*│\s*([\d.eE+-]+)")


def run_memtx(*arguments: str) -> str:
    """Return what `memtx` printed; ends the script with its message if it failed."""
    environment = os.environ | {"PYTHONPATH": str(REPO_ROOT), "COLUMNS": "100"}
    command = [sys.executable, "-m", "memtx", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr.strip().splitlines()[-1])
    return done.stdout


def read_losses(path: Path) -> tuple[float, float]:
    """Return the mean training loss of a run's first and last tenth."""
    with path.open(newline="") as file:
        found = [float(row["train_loss"]) for row in csv.DictReader(file) if row.get("train_loss")]
    if not found:
        return math.nan, math.nan  # too short a run for a line
    part = max(1, len(found) // 10)
    return sum(found[:part]) / part, sum(found[-part:]) / part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="holds a folder of examples for each task")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output-dir", default="runs/tasks", help="where the runs are kept")
    arguments = parser.parse_args()
    print(
        "| task | seed | on the test examples | training loss, first and last tenth | seconds |\n|---|---|---|---|---|"
    )
    for task in arguments.tasks:
        for seed in arguments.seeds:
            run = Path(arguments.output_dir) / f"{task}-{seed}"
            began = time.perf_counter()
            run_memtx(
                "fit", "--config", str(REPO_ROOT / "configs" / f"{task}.yaml"), "--run_dir", str(run),
                "--seed_everything", str(seed), "--data.root", str(Path(arguments.data) / task),
                "--data.seed", str(seed),
            )  # fmt: skip
            seconds = time.perf_counter() - began
            figures = METRIC_PATTERN.findall(run_memtx("test", "--run_dir", str(run)))
            shown = ", ".join(f"{name.removeprefix('test_')} {float(value):.3f}" for name, value in figures)
            first, last = read_losses(run / "metrics.csv")
            print(f"| {task} | {seed} | {shown} | {first:.2f}, {last:.2f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
