"""Measure training and generation quiet and beside busy processes, with OpenMP's default spin and with memtx's.

    python scripts/measure_contention.py [--repeats 3] [--steps 60] [--busy 2] [--json]

The two columns alternate, so that a slow minute affects both. The busy processes belong to this session, because Linux
shares the cores between sessions first (autogroup). The default is set by its number, which memtx would replace.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from training_runs import config_path, last_value, memtx_command, memtx_environment, read_metrics

SPINS = {"libgomp's default": "300000", "GOMP_SPINCOUNT=30000": "30000"}


def run(arguments: list[str], spin: str) -> float:
    """Run a command with a spin count and return its seconds."""
    environment = {**memtx_environment(), "GOMP_SPINCOUNT": spin}
    environment.pop("OMP_NUM_THREADS", None)
    start = time.perf_counter()
    subprocess.run(memtx_command(*arguments), env=environment, check=True, capture_output=True)
    return time.perf_counter() - start


def train(run_dir: Path, steps: int, spin: str) -> float:
    """Return the training tokens per second of the last logged steps of the quickstart's model."""
    run([
        "fit", "--config", config_path("quickstart"), "--run_dir", str(run_dir), "--trainer.max_steps", str(steps),
        "--trainer.limit_val_batches", "0", "--trainer.num_sanity_val_steps", "0",
    ], spin)  # fmt: skip
    return last_value(read_metrics(run_dir), "tokens_per_second")


def generate(run_dir: Path, tokens: int, spin: str) -> float:
    """Return the generated tokens per second, as the server computes them, without the start of the process."""
    options = ["generate", "--checkpoint", str(run_dir), "--prompt", "The", "--device", "cpu", "--max-tokens"]
    seconds = run([*options, str(tokens)], spin) - run([*options, "1"], spin)
    return (tokens - 1) / max(seconds, 1e-9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each cell; the median counts")
    parser.add_argument("--steps", type=int, default=60, help="training steps of a run")
    parser.add_argument("--tokens", type=int, default=2000, help="generated tokens of a run")
    parser.add_argument("--busy", type=int, default=2, help="busy processes")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    arguments = parser.parse_args()
    cells: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        train(model, 20, "30000")
        for load in (0, arguments.busy):
            busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(load)]
            try:
                for repeat in range(arguments.repeats):
                    for name, spin in SPINS.items():
                        run_dir = Path(folder) / f"{load}-{repeat}-{spin}"
                        speeds = {"training": train(run_dir, arguments.steps, spin)}
                        speeds["generation"] = generate(model, arguments.tokens, spin)
                        for task, speed in speeds.items():
                            row = f"{task}, {'quiet' if not load else f'beside {load} busy processes'}"
                            cells.setdefault(row, {}).setdefault(name, []).append(speed)
            finally:
                for process in busy:
                    process.kill()
                    process.wait()
    medians = {row: {name: statistics.median(values) for name, values in cell.items()} for row, cell in cells.items()}
    if arguments.json:
        print(json.dumps({"cpus": os.cpu_count(), "tokens_per_second": medians}))
        return
    print(f"| tokens/s ({os.cpu_count()} CPUs) | {' | '.join(SPINS)} |\n|---|---|---|")
    for row, cell in medians.items():
        print(f"| {row} | {' | '.join(f'{value:,.0f}' for value in cell.values())} |")


if __name__ == "__main__":
    main()
