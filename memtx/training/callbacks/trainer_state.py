"""Where in a step a callback stands: what may be saved, and what comes next."""

from __future__ import annotations

import math
import sys
from typing import Any, cast

import lightning.pytorch as pl


def has_stepped(trainer: pl.Trainer) -> bool:
    """Return whether the batch in hand ended in an optimiser step.

    If not, gradients are half accumulated, and a checkpoint would lose them.
    """
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def is_unstable(trainer: pl.Trainer) -> bool:
    """Return whether a guard sees the run in trouble, so that a checkpoint would be no good one."""
    return any(getattr(one, "is_unstable", False) for one in cast(Any, trainer).callbacks)


def will_validate(trainer: pl.Trainer) -> bool:
    """Return whether validation follows on the batch in hand.

    A checkpoint written before it counts it as done: the run that goes on from there would never have it.
    """
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def is_last_step(trainer: pl.Trainer) -> bool:
    """Return whether the batch in hand is the run's last."""
    if trainer.max_steps > 0 and trainer.global_step >= trainer.max_steps:
        return True
    ends = trainer.fit_loop.epoch_loop._num_ready_batches_reached()
    return ends and trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs


def total_steps(trainer: pl.Trainer) -> int | None:
    """Return the optimiser steps of the whole run, None where it has no end."""
    limits = [trainer.max_steps] if trainer.max_steps > 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs > 0 and math.isfinite(trainer.num_training_batches):
        limits.append(math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches) * trainer.max_epochs)
    return min(limits) if limits else None


def write_status(trainer: pl.Trainer, message: str) -> None:
    """Write a line on stderr, once for all processes, with the step that it is of."""
    if trainer.is_global_zero:
        sys.stderr.write(f"step {trainer.global_step}  {message}\n")
