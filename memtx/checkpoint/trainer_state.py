"""State of a Lightning trainer within a step, for callbacks: progress, safe points to save, and status lines."""

from __future__ import annotations

import math
import sys
from typing import Any, Protocol, cast, runtime_checkable

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler


@runtime_checkable
class CountsSteps(Protocol):
    """A callback that changes the number of accumulated batches."""

    def count_steps(self, batches_per_epoch: float, num_epochs: int) -> int:
        """Return the optimizer steps of a number of epochs."""


def has_stepped(trainer: pl.Trainer) -> bool:
    """Return whether the current batch ended in an optimizer step; if not, a checkpoint loses accumulated gradients."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def is_unstable(trainer: pl.Trainer) -> bool:
    """Return whether a callback considers the run unstable, so that no checkpoint should be written."""
    return any(getattr(callback, "is_unstable", False) for callback in cast(Any, trainer).callbacks)


def will_validate(trainer: pl.Trainer) -> bool:
    """Return whether validation follows the current batch; a run resumed from a checkpoint before it would skip it."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def is_last_step(trainer: pl.Trainer) -> bool:
    """Return whether the current batch is the last of the run."""
    if trainer.should_stop and trainer.fit_loop._can_stop_early:
        return True
    if trainer.max_steps > 0 and trainer.global_step >= trainer.max_steps:
        return True
    ends_epoch = trainer.fit_loop.epoch_loop._num_ready_batches_reached()
    return ends_epoch and trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs


def total_steps(trainer: pl.Trainer, batches_per_epoch: float | None = None) -> int | None:
    """Return the optimizer steps of the whole run, None if it is endless; of the trainer's batches once it has them."""
    limits = [trainer.max_steps] if trainer.max_steps > 0 else []
    num_batches = trainer.num_training_batches if batches_per_epoch is None else batches_per_epoch
    if trainer.max_epochs is not None and trainer.max_epochs > 0 and math.isfinite(num_batches):
        # An epoch ends with an optimizer step, however few batches were accumulated.
        callbacks: list[Any] = cast(Any, trainer).callbacks
        by_step = next((callback for callback in callbacks if isinstance(callback, CountsSteps)), None)
        if by_step is not None:
            return min([*limits, by_step.count_steps(num_batches, trainer.max_epochs)])
        schedule = _find_schedule(trainer) or GradientAccumulationScheduler({0: trainer.accumulate_grad_batches})
        get_count = schedule.get_accumulate_grad_batches
        limits.append(sum(math.ceil(num_batches / get_count(epoch)) for epoch in range(trainer.max_epochs)))
    return min(limits) if limits else None


def _find_schedule(trainer: pl.Trainer) -> GradientAccumulationScheduler | None:
    callbacks: list[Any] = cast(Any, trainer).callbacks
    return next((entry for entry in callbacks if isinstance(entry, GradientAccumulationScheduler)), None)


def sync_accumulation(trainer: pl.Trainer) -> None:
    """Set the accumulated batches of a run resumed within an epoch, which Lightning sets where an epoch begins."""
    if (schedule := _find_schedule(trainer)) is not None:
        trainer.accumulate_grad_batches = schedule.get_accumulate_grad_batches(trainer.current_epoch)


def sync_batch_progress(trainer: pl.Trainer) -> None:
    """Set the trainer's batch count of the epoch to the data's, which differs after an elastic resume."""
    loader = trainer.train_dataloader
    position = getattr(loader, "position", None)
    if loader is None or not isinstance(position, int):
        return
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    # At a checkpoint of an epoch's last batch, the data is in the next epoch and Lightning is not.
    num_batches = getattr(loader, "steps_per_epoch", len(loader))
    shift = (position % num_batches or (num_batches if progress.ready else 0)) - progress.ready
    for name in ("ready", "started", "processed", "completed"):
        setattr(progress, name, getattr(progress, name) + shift)


def write_status(trainer: pl.Trainer, message: str) -> None:
    """Write a line with the current step to stderr, on rank 0 only."""
    if trainer.is_global_zero:
        sys.stderr.write(f"step {trainer.global_step}  {message}\n")
