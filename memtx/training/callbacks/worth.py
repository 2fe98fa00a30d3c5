"""Says in words when a run does not use its memory."""

from __future__ import annotations

import math
import sys

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

MIN_GAIN = 1e-3
"""Bits per byte: seeds of equal runs differ by more."""


class UnusedMemoryWarning(pl.Callback):
    """Writes a line to stderr after a validation that the memory made no better; needs ``measure_memory_gain``."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare, and say it."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING or not trainer.is_global_zero:
            return
        gain = float(trainer.callback_metrics.get("val_memory_gain", math.nan))
        if math.isnan(gain) or gain >= MIN_GAIN:
            return
        how = f"{-gain:.4f} better" if gain < 0 else f"only {gain:.4f} worse"
        sys.stderr.write(
            f"step {trainer.global_step}  The memory is not used: cleared at every segment, validation is {how} in "
            "bits per byte. Shorter segments, a longer horizon or more steps may change that.\n"
        )
