"""Measure the shipped task configs, trained from scratch: metrics on the test examples, and seconds, seed by seed.

    python scripts/measure_tasks.py [--data FOLDER] [--tasks movie-reviews conll2000 ...] [--seeds 0 1 2]
        [--output-dir runs/tasks]

FOLDER holds a folder of examples for each task, named like its config; make_tasks.py makes the last five. Each run
calls `memtx fit` and `memtx test`, as a user would.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from pathlib import Path

from benchmarking import add_data_option
from training_runs import read_metrics, run_fit, run_memtx

MADE_TASKS = ("multiple-choice", "retrieval", "dialogue", "dialogue-replies", "multi-label")
TASKS = ("movie-reviews", "conll2000", "rte", "squad2", *MADE_TASKS)
METRIC_PATTERN = re.compile(r"(test_\w+)\s*│\s*([\d.eE+-]+)")


def read_losses(run_dir: Path) -> tuple[float, float]:
    """Return the mean training losses of the first and the last tenth of a run."""
    losses = [float(row["train_loss"]) for row in read_metrics(run_dir) if row.get("train_loss")]
    if not losses:
        return math.nan, math.nan  # The run was too short to log a loss.
    tenth = max(1, len(losses) // 10)
    return sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_option(parser, "--data", text="a folder of examples for each task")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/tasks"), help="folder of the runs")
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    print("| task | seed | test examples | training loss, first and last tenth | seconds |\n|---|---|---|---|---|")
    for task in arguments.tasks:
        for seed in arguments.seeds:
            run_dir = arguments.output_dir / f"{task}-{seed}"
            start = time.perf_counter()
            run_fit(run_dir, task, arguments.data / task, seed, num_threads=None)
            seconds = time.perf_counter() - start
            figures = METRIC_PATTERN.findall(run_memtx("test", "--run_dir", str(run_dir)))
            scores = ", ".join(f"{name.removeprefix('test_')} {float(value):.3f}" for name, value in figures)
            first, last = read_losses(run_dir)
            print(f"| {task} | {seed} | {scores} | {first:.2f}, {last:.2f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
