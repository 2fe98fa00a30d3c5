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

from memtx.data.episodes.base import Task
from memtx.models.memory_transformer import MemoryTransformer
from memtx.training.tbptt import unroll


def learned(
    model: MemoryTransformer, task: Task, *, seed: int, steps: int, rows: int, segments: int, rate: float
) -> float:
    """Train a model on episodes, one gradient through each, and leave it in eval mode.

    Returns:
        the seconds of this process that training took.
    """
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    began = time.process_time()
    for _ in range(steps):
        parts = list(task.episodes(rows, segments, draw))
        tokens, labels = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        nowhere, fresh = torch.zeros_like(tokens, dtype=torch.bool), model.init_state(rows)
        found = unroll(model, tokens, labels, nowhere, fresh, segment=task.segment)
        optimizer.zero_grad()
        found.loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    spent = time.process_time() - began
    model.eval()
    return spent


def fitted(
    run: Path, config: str, root: Path, seed: int, settings: Sequence[str], threads: int = 1
) -> list[dict[str, str]]:
    """Train a config on books into a run's folder, going on where it stopped, and return the lines of its figures."""
    command = [
        sys.executable, "-m", "memtx", "fit", "--config", config, "--data.root", str(root), "--run", str(run),
        "--seed_everything", str(seed), "--data.seed", str(seed), "--ckpt_path", "last", *settings,
    ]  # fmt: skip
    with (run.parent / f"{run.name}.log").open("w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, check=True, env=environment, stdout=log, stderr=log)
    with (run / "metrics.csv").open() as lines:
        return list(csv.DictReader(lines))


def last(lines: Sequence[dict[str, str]], name: str) -> float:
    """Return the newest figure of that name; raises KeyError where there is none."""
    for line in reversed(lines):
        if line.get(name):
            return float(line[name])
    raise KeyError(name)
