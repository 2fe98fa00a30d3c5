"""What the comparisons share: a model trained on a drawn task, and a run of `memtx fit` with its figures."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from memtx.data.synthetic_tasks.base import SyntheticTask
from memtx.models.memory_transformer import MemoryTransformer
from memtx.training.tbptt import unroll


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
    """Train a model on episodes, one gradient through each, and leave it in eval mode.

    Returns:
        the seconds of this process that training took.
    """
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    began = time.process_time()
    for _ in range(steps):
        parts = list(task.iter_segments(batch_size, num_segments, draw))
        tokens, labels = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        nowhere, fresh = torch.zeros_like(tokens, dtype=torch.bool), model.init_state(batch_size)
        found = unroll(model, tokens, labels, nowhere, fresh, segment_length=task.segment_length)
        optimizer.zero_grad()
        found.loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    spent = time.process_time() - began
    model.eval()
    return spent


def run_fit(
    run_dir: Path, config: str, root: Path, seed: int, options: Sequence[str], num_threads: int = 1
) -> list[dict[str, str]]:
    """Train a config on books into a run's folder, going on where it stopped, and return the lines of its figures."""
    command = [
        sys.executable, "-m", "memtx", "fit", "--config", config, "--data.root", str(root), "--run_dir", str(run_dir),
        "--seed_everything", str(seed), "--data.seed", str(seed), "--ckpt_path", "last", *options,
    ]  # fmt: skip
    with (run_dir.parent / f"{run_dir.name}.log").open("w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
        subprocess.run(command, check=True, env=environment, stdout=log, stderr=log)
    with (run_dir / "metrics.csv").open() as lines:
        return list(csv.DictReader(lines))


def last_value(rows: Sequence[dict[str, str]], name: str) -> float:
    """Return the newest figure of that name; raises KeyError where there is none."""
    for line in reversed(rows):
        if line.get(name):
            return float(line[name])
    raise KeyError(name)
