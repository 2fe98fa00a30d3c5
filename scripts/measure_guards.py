"""Measure the cost of guards and checkpoints in training: time in each guard, and time that training waits for a save.

    python scripts/measure_guards.py [--steps 100] [--dim 192] [--depth 4] [--json FILE] [--markdown FILE]

A model is trained on the texts that come with Python with all guards; their calls and all saves are timed, first with
checkpoints written in place, then with a writer thread. A step lasts from the start to the end of a batch, without
saves; the first ten do not count.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import benchmarking
import lightning.pytorch as pl
import torch

from memtx.checkpoint.async_io import AsyncAtomicCheckpointIO
from memtx.checkpoint.training import AtomicCheckpointIO, BestCheckpoint
from memtx.data.books import BookDataModule
from memtx.memory.compressed import CompressedMemory
from memtx.models.memory_transformer import MemoryTransformer
from memtx.training.callbacks.loss_spikes import RewindOnSpike
from memtx.training.callbacks.memory_monitor import MemoryNormMonitor
from memtx.training.callbacks.oom import OutOfMemoryHint
from memtx.training.callbacks.skip_nonfinite import SkipNonFinite
from memtx.training.language import LanguageModule

WARMUP_STEPS = 10
GUARDS: tuple[type[pl.Callback], ...] = (SkipNonFinite, MemoryNormMonitor, RewindOnSpike, OutOfMemoryHint)


class StepTimer(pl.Callback):
    """Times training batches."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the timer."""
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the timer; the callbacks that save come later."""
        self.seconds.append(time.perf_counter() - self._start)


def time_method(owner: Any, name: str, seconds: list[float]) -> None:
    """Append the duration of each call of a method to ``seconds``."""
    method: Callable[..., Any] = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*arguments, **options)
        finally:
            seconds.append(time.perf_counter() - start)

    setattr(owner, name, call)


def time_hooks(guard: pl.Callback) -> list[float]:
    """Time a guard's own hooks; return the list of their durations."""
    seconds: list[float] = []
    for name in vars(type(guard)):
        if name.startswith("on_"):
            time_method(guard, name, seconds)
    return seconds


def measure(arguments: argparse.Namespace, checkpoint_io: AtomicCheckpointIO, folder: Path) -> dict[str, Any]:
    """Train with all guards and return the times of steps, guards and saves."""
    memory = partial(CompressedMemory, window=128, compression_rate=4, num_entries=64)
    build_model = partial(MemoryTransformer, dim=arguments.dim, depth=arguments.depth, heads=4, memories=[memory])
    module = LanguageModule(build_model, segment_length=128, measure_memory_gain=False)
    books = BookDataModule("embedded", batch_size=8, segment_length=128, cache_dir=str(folder / "cache"), num_workers=1)
    guards, timer = [guard() for guard in GUARDS], StepTimer()
    guard_seconds = {type(guard).__name__: time_hooks(guard) for guard in guards}
    saves: list[float] = []
    time_method(checkpoint_io, "save_checkpoint", saves)
    checkpoints = folder / type(checkpoint_io).__name__
    save = BestCheckpoint(str(checkpoints), every_n_train_steps=10)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=arguments.steps, max_epochs=-1, limit_val_batches=0, logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, gradient_clip_val=1.0,
        plugins=[checkpoint_io], callbacks=[*guards, timer, save], use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=books)
    return {
        "parameters": benchmarking.count_parameters(module),
        "checkpoint_bytes": (checkpoints / "last.ckpt").stat().st_size,
        "step_seconds": vars(benchmarking.Spread.from_values(timer.seconds[WARMUP_STEPS:])),
        "guard_seconds": {name: sum(times) / len(timer.seconds) for name, times in guard_seconds.items()},
        "save_seconds": vars(benchmarking.Spread.from_values(saves)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    benchmarking.add_size_options(parser, steps=100, dim=192, depth=4)
    benchmarking.add_output_options(parser)
    arguments = parser.parse_args()
    arguments.steps += WARMUP_STEPS
    with tempfile.TemporaryDirectory() as folder:
        writers = (AtomicCheckpointIO, AsyncAtomicCheckpointIO)
        results = {writer.__name__: measure(arguments, writer(), Path(folder)) for writer in writers}
    machine, first = benchmarking.machine_info(torch.device("cpu")), results["AtomicCheckpointIO"]
    step = first["step_seconds"]["median"]
    lines = [
        f"{benchmarking.format_machine(machine)}; {first['parameters']:,} parameters, "
        f"{1000 * step:.0f} ms per step of 8 x 128 tokens",
        "",
        "| guard | ms per step | of the step |",
        "|---|---|---|",
    ]
    for name, seconds in first["guard_seconds"].items():
        lines.append(f"| {name} | {1000 * seconds:.2f} | {100 * seconds / step:.2f}% |")
    lines += ["", "| checkpoints | ms that training waits for a save, median (minimum to maximum) |", "|---|---|"]
    for name, result in results.items():
        wait = {key: 1000 * value for key, value in result["save_seconds"].items()}
        lines.append(f"| {name} | {wait['median']:.0f} ({wait['min']:.0f} to {wait['max']:.0f}) |")
    lines.append(f"\nA checkpoint takes {first['checkpoint_bytes'] / benchmarking.MIB:.1f} MiB.")
    benchmarking.write_results(arguments, {"machine": machine, "writers": results}, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
