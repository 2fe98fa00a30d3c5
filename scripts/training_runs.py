"""Runs of the `memtx` command, and models trained on synthetic tasks."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from memtx.data.synthetic_tasks.base import SyntheticTask
from memtx.models.memory_transformer import MemoryTransformer
from memtx.training.tbptt import unroll

REPO_ROOT = Path(__file__).resolve().parent.parent


def config_path(name: str) -> str:
    """Return the path of a shipped config."""
    return str(REPO_ROOT / "configs" / f"{name}.yaml")


def memtx_command(*arguments: str) -> list[str]:
    """Return the command line that runs `memtx` in a separate process."""
    return [sys.executable, "-m", "memtx", *arguments]


def memtx_environment(num_threads: int | None = None) -> dict[str, str]:
    """Return the environment of :func:`memtx_command`: this checkout, and optionally a number of threads."""
    threads = {} if num_threads is None else {"OMP_NUM_THREADS": str(num_threads)}
    path = os.pathsep.join([str(REPO_ROOT), str(REPO_ROOT / "scripts")])  # configs may name CpuSeconds
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "100", **threads}


def run_memtx(*arguments: str, num_threads: int | None = None, log: Path | None = None) -> str:
    """Run `memtx` and return its standard output; exit with its last error line if it fails.

    Args:
        *arguments: Command line.
        num_threads: Threads of the process. None leaves the choice to torch.
        log: File for the command's output, which is then not returned.
    """
    with ExitStack() as stack:
        output = stack.enter_context(log.open("w+")) if log is not None else subprocess.PIPE
        process = subprocess.run(
            memtx_command(*arguments), env=memtx_environment(num_threads), stdout=output,
            stderr=subprocess.PIPE if log is None else subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
    errors = process.stderr if log is None else log.read_text()
    if process.returncode:
        sys.exit((errors.strip().splitlines() or [f"memtx exited with code {process.returncode}."])[-1])
    return process.stdout or ""


class CpuSeconds(pl.Callback):
    """Logs ``cpu_seconds``, those of the process since training began, without the time of interruptions."""

    def __init__(self) -> None:
        self._seconds, self._start = 0.0, 0.0

    def _read(self) -> float:
        return self._seconds + time.process_time() - self._start

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._start = time.process_time()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Log the seconds."""
        pl_module.log("cpu_seconds", self._read())

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds so far."""
        return {"seconds": self._read()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the seconds of a checkpoint."""
        self._seconds = state_dict["seconds"]


def run_fit(
    run_dir: Path, config: str | Path, root: Path, seed: int, options: Sequence[str] = (), num_threads: int | None = 1
) -> list[dict[str, str]]:
    """Train a config, resuming the run if it was interrupted, and return the rows of its metrics.csv.

    The config is the name of a shipped one, or a path.
    """
    path = config_path(config) if isinstance(config, str) else str(config)
    run_memtx(
        "fit", "--config", path, "--data.root", str(root), "--run_dir", str(run_dir),
        "--seed_everything", str(seed), "--data.seed", str(seed), "--ckpt_path", "last", *options,
        num_threads=num_threads, log=run_dir.parent / f"{run_dir.name}.log",
    )  # fmt: skip
    return read_metrics(run_dir)


def read_metrics(run_dir: Path) -> list[dict[str, str]]:
    """Return the rows of a run's metrics.csv."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def last_value(rows: Sequence[dict[str, str]], name: str) -> float:
    """Return the last logged value of a metric.

    Raises:
        KeyError: The metric was never logged.
    """
    for row in reversed(rows):
        if row.get(name):
            return float(row[name])
    raise KeyError(name)


def train_on_episodes(
    model: MemoryTransformer,
    task: SyntheticTask,
    *,
    seed: int,
    steps: int,
    batch_size: int,
    num_segments: int,
    learning_rate: float,
) -> float:
    """Train a model by back-propagation through whole episodes, and leave it in eval mode.

    Returns:
        CPU seconds of training.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    start = time.process_time()
    for _ in range(steps):
        segments = list(task.iter_segments(batch_size, num_segments, generator))
        tokens, labels = (torch.cat(parts, dim=1) for parts in zip(*segments, strict=True))
        document_starts, state = torch.zeros_like(tokens, dtype=torch.bool), model.init_state(batch_size)
        out = unroll(model, tokens, labels, document_starts, state, segment_length=task.segment_length)
        optimizer.zero_grad()
        out.loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    seconds = time.process_time() - start
    model.eval()
    return seconds
