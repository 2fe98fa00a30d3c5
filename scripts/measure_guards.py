"""What guards and checkpoints cost a training step: the time spent in each guard, and that training waits for a save.

    python scripts/measure_guards.py [--steps 100] [--dim 192] [--depth 4] [--json FILE] [--markdown FILE]

A model is trained on the texts that come with Python, with all guards; every call of theirs is timed, and so is every
save, first with checkpoints written in place, then by a thread. A step is the time between a batch's beginning and its
end without saves; the first ten are not counted.
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

import lightning.pytorch as pl
import torch
from measuring import Spread, format_machine, machine_info, positive_int, write_results

from memtx.checkpoint.async_io import AsyncAtomicCheckpointIO
from memtx.checkpoint.training import AtomicCheckpointIO, BestCheckpoint
from memtx.data.books import BookDataModule
from memtx.memory.compressed import CompressedMemory
from memtx.models.memory_transformer import MemoryTransformer
from memtx.training.callbacks.health import MemoryNormMonitor
from memtx.training.callbacks.loss_spikes import RewindOnSpike
from memtx.training.callbacks.oom import OutOfMemoryHint
from memtx.training.callbacks.skip_nonfinite import SkipNonFinite
from memtx.training.language import LanguageModule

WARMUP_STEPS = 10
GUARDS: tuple[type[pl.Callback], ...] = (SkipNonFinite, MemoryNormMonitor, RewindOnSpike, OutOfMemoryHint)


class StepTimer(pl.Callback):
    """Times batches."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin."""
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End; callbacks that save come later."""
        self.seconds.append(time.perf_counter() - self._began)


def time_method(owner: Any, name: str, seconds: list[float]) -> None:
    """Have calls of a method timed."""
    method: Callable[..., Any] = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return method(*arguments, **options)
        finally:
            seconds.append(time.perf_counter() - began)

    setattr(owner, name, call)


def time_hooks(guard: pl.Callback) -> list[float]:
    """Have a guard's own hooks timed; return where the times are collected."""
    seconds: list[float] = []
    for name in vars(type(guard)):
        if name.startswith("on_"):
            time_method(guard, name, seconds)
    return seconds


def measure(arguments: argparse.Namespace, checkpoint_io: AtomicCheckpointIO, folder: Path) -> dict[str, Any]:
    """Train with all guards and return what took how long."""
    memory = partial(CompressedMemory, window=128, compression_rate=4, num_entries=64)
    make = partial(MemoryTransformer, dim=arguments.dim, depth=arguments.depth, heads=4, memories=[memory])
    module = LanguageModule(make, segment_length=128, measure_memory_gain=False)
    books = BookDataModule("embedded", batch_size=8, segment_length=128, cache_dir=str(folder / "cache"), num_workers=1)
    guards, steps = [kind() for kind in GUARDS], StepTimer()
    spent = {type(guard).__name__: time_hooks(guard) for guard in guards}
    saves: list[float] = []
    time_method(checkpoint_io, "save_checkpoint", saves)
    keep = BestCheckpoint(str(folder / type(checkpoint_io).__name__), every_n_train_steps=10)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=arguments.steps, max_epochs=-1, limit_val_batches=0, logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, gradient_clip_val=1.0,
        plugins=[checkpoint_io], callbacks=[*guards, steps, keep], use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=books)
    counted = steps.seconds[WARMUP_STEPS:]
    return {
        "parameters": sum(one.numel() for one in module.parameters()),
        "checkpoint_bytes": (folder / type(checkpoint_io).__name__ / "last.ckpt").stat().st_size,
        "step_seconds": vars(Spread.from_values(counted)),
        "guard_seconds": {name: sum(found) / len(steps.seconds) for name, found in spent.items()},
        "save_seconds": vars(Spread.from_values(saves)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive_int, default=100)
    parser.add_argument("--dim", type=positive_int, default=192)
    parser.add_argument("--depth", type=positive_int, default=4)
    parser.add_argument("--json", metavar="FILE", help="all figures; - for standard output, instead of the table")
    parser.add_argument("--markdown", metavar="FILE", help="the table")
    arguments = parser.parse_args()
    arguments.steps += WARMUP_STEPS
    with tempfile.TemporaryDirectory() as at:
        kinds = (AtomicCheckpointIO, AsyncAtomicCheckpointIO)
        found = {kind.__name__: measure(arguments, kind(), Path(at)) for kind in kinds}
    where, first = machine_info(torch.device("cpu")), found["AtomicCheckpointIO"]
    step = first["step_seconds"]["median"]
    lines = [
        f"{format_machine(where)}; {first['parameters']:,} parameters, "
        f"a step of 8 x 128 tokens takes {1000 * step:.0f} ms",
        "",
        "| guard | ms a step | of the step |",
        "|---|---|---|",
    ]
    for name, seconds in first["guard_seconds"].items():
        lines.append(f"| {name} | {1000 * seconds:.2f} | {100 * seconds / step:.2f}% |")
    lines += ["", "| checkpoints | ms that training waits for a save, median (least to most) |", "|---|---|"]
    for name, one in found.items():
        wait = {key: 1000 * value for key, value in one["save_seconds"].items()}
        lines.append(f"| {name} | {wait['median']:.0f} ({wait['min']:.0f} to {wait['max']:.0f}) |")
    lines.append(f"\nA checkpoint is {first['checkpoint_bytes'] / 2**20:.1f} MiB.")
    write_results(arguments, {"machine": where, "writers": found}, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
