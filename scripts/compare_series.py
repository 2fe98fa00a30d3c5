"""Compares a memory with the window alone and a GRU of equal size on two kinds of series.

A motif of random values that returns every 48 steps pays for a memory; a damped oscillation pushed by noise, which the
last two values tell all about, does not. Trained by ``SequenceModule`` on series in memory.

    python scripts/compare_series.py --json series.json --markdown series.md --plot series.png
    python scripts/compare_series.py --write FOLDER     # writes motif series as CSV, for configs/series.yaml
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from sequence_peers import add_options, build_models, compare
from torch import nn

from memtx import files
from memtx.data.batch import FixedBatches, SequenceBatch
from memtx.layers.vector_heads import RegressionHead
from memtx.models.sequence_model import SequenceModel
from memtx.training.optimizers import WarmupCosine
from memtx.training.sequence import SequenceModule

PERIOD, NOISE, LENGTH, BATCH_SIZE, WINDOW, SEGMENT_LENGTH = 48, 0.3, 192, 16, 16, 48
MODELS = ("compressed memory", "window", "GRU")


def sample_motif(batch_size: int, length: int, generator: np.random.Generator) -> np.ndarray:
    """Return series ``(batch, length, 1)``, each with a motif of its own that returns with noise."""
    motif = generator.standard_normal((batch_size, PERIOD))
    values = np.tile(motif, (1, -(-length // PERIOD)))[:, :length]
    return (values + NOISE * generator.standard_normal(values.shape))[..., None]


def sample_oscillation(batch_size: int, length: int, generator: np.random.Generator) -> np.ndarray:
    """Return series ``(batch, length, 1)`` of x[t] = 1.6 x[t-1] - 0.8 x[t-2] + noise, scaled to about unit variance."""
    noise = generator.standard_normal((batch_size, length + 50))
    values = np.zeros_like(noise)
    for step in range(2, length + 50):
        values[:, step] = 1.6 * values[:, step - 1] - 0.8 * values[:, step - 2] + noise[:, step]
    return values[:, 50:, None] / 3.7


SERIES = {"motif": sample_motif, "oscillation": sample_oscillation}


def make_batch(kind: str, seed: tuple[int, ...]) -> SequenceBatch:
    """Return whole series, with the next value as the label."""
    values = SERIES[kind](BATCH_SIZE, LENGTH + 1, np.random.default_rng(seed)).astype(np.float32)
    document_starts = np.zeros((BATCH_SIZE, LENGTH), dtype=np.bool_)
    document_starts[:, 0] = True
    return SequenceBatch(*map(torch.from_numpy, (values[:, :-1], values[:, 1:], document_starts)))


def make_model(backbone: Callable[[int], nn.Module]) -> SequenceModel:
    """Return a model of one column."""
    return SequenceModel(1, 1, backbone=backbone, head=RegressionHead)


def train(kind: str, make: Callable[[], SequenceModel], seed: int, steps: int) -> tuple[float, float]:
    """Train a model; return its mean squared error on new series and the seconds of training."""
    pl.seed_everything(seed, verbose=False)
    module = SequenceModule(
        lambda *_: make(), segment_length=SEGMENT_LENGTH, measure_memory_gain=False,
        optimizer=partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.01),
        scheduler=partial(WarmupCosine, warmup_steps=30),
    )  # fmt: skip
    options: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "accelerator": "cpu",
    }
    trainer = pl.Trainer(max_steps=steps, enable_model_summary=False, gradient_clip_val=1.0, **options)
    start = time.process_time()
    trainer.fit(module, FixedBatches(steps, lambda step: make_batch(kind, (seed, step))))
    seconds = time.process_time() - start
    result = trainer.test(module, FixedBatches(16, lambda step: make_batch(kind, (10**6, step))), verbose=False)
    return result[0]["test_mse"], seconds


def write_series(folder: Path, generator: np.random.Generator) -> None:
    """Write smooth motifs with noise, of two columns, as CSV files in splits."""
    for split, count in (("train", 24), ("validation", 4), ("test", 4)):
        for index in range(count):
            motif = generator.standard_normal(PERIOD)
            motif += np.roll(motif, 1) + np.roll(motif, 2)
            values = np.tile(motif, 25) + NOISE * generator.standard_normal(25 * PERIOD)
            lines = [f"{value:.4f},{20 + value**2:.3f}" for value in values]
            files.write_text(folder / split / f"motif-{index}.csv", "\n".join(["level,temperature", *lines, ""]))


def main() -> None:
    """Compare the models, or write series."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--write", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    if arguments.write is not None:
        write_series(arguments.write, np.random.default_rng(0))
        return
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    compare(
        arguments, SERIES, build_models(MODELS, make_model, WINDOW), partial(train, steps=arguments.steps),
        names=("series", "model", "mean squared error"), keys=("series", "model", "mse"),
        title="Series", unit="mean squared error, one step ahead",
    )  # fmt: skip


if __name__ == "__main__":
    main()
