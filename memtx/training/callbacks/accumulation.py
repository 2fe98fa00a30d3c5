"""Accumulated gradients by step of the training: small batches at first, larger ones later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

from memtx.errors import MemtxError


class AccumulationSchedule(pl.Callback):
    """Changes the number of batches per optimizer step during the run, in the middle of an epoch too.

    The Compressive Transformer updates its weights with every batch, and from a step on with every fourth, in place of
    a lower learning rate (Rae et al. 2020, section 5.5.1). A new number begins where the batches of the epoch so far
    are a multiple of it, so every step sums its full number of batches, except for the last one of an epoch. The number
    follows from the step and the batch alone, so a resumed run goes on with the same.

    Args:
        schedule: Batches per optimizer step from each optimizer step on, such as ``{0: 1, 60000: 4}``.

    Raises:
        MemtxError: A number is out of range, or ``trainer.accumulate_grad_batches`` is set too.
    """

    def __init__(self, schedule: Mapping[int, int]) -> None:
        self.schedule = dict(sorted({0: 1, **schedule}.items()))
        for step, count in self.schedule.items():
            if step < 0 or count < 1:
                message = f"AccumulationSchedule has {count} batches per step from step {step} on."
                raise MemtxError(message, "Give steps of at least 0, with at least 1 batch.")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that nothing else sets the number."""
        if stage == "fit" and trainer.accumulate_grad_batches != 1:
            message = f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches} beside a schedule of it."
            raise MemtxError(message, "Remove it, or AccumulationSchedule.")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the number where an optimizer step begins."""
        num_batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1
        if num_batches % trainer.accumulate_grad_batches == 0:
            trainer.accumulate_grad_batches = self.find_count(trainer.global_step, num_batches)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the number back, so that the trainer can be used again."""
        trainer.accumulate_grad_batches = 1

    def find_count(self, step: int, num_batches: int) -> int:
        """Return the batches of an optimizer step that begins after ``num_batches`` batches of the epoch."""
        counts = (count for start, count in reversed(self.schedule.items()) if start <= step)
        return next((count for count in counts if num_batches % count == 0), 1)

    def count_steps(self, batches_per_epoch: float, num_epochs: int) -> int:
        """Return the optimizer steps of a number of epochs."""
        step = 0
        for _ in range(num_epochs):
            num_batches = 0
            while num_batches < batches_per_epoch:
                num_batches += self.find_count(step, num_batches)
                step += 1
        return step

    def count_batches(self, num_steps: int) -> int:
        """Return the batches of the first steps of an endless epoch."""
        num_batches = 0
        for step in range(num_steps):
            num_batches += self.find_count(step, num_batches)
        return num_batches
