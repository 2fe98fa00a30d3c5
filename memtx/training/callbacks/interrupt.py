"""Ctrl-C without loss: the batch in hand is finished, its end is saved, then the run stops."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

from memtx.training.callbacks import moments

STOPPED = 130
"""The exit code of a process that the trainer forked or spawned, where it was interrupted: 128 and SIGINT's number."""


class StopOnInterrupt(pl.Callback):
    """Turns the first Ctrl-C (or SIGTERM) into a save at the next optimiser step; a second one stops at once."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen, where a process can (the main thread)."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        self._put_back()

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop, if asked to and no accumulated gradient would be lost."""
        if not moments.has_stepped(trainer):
            return
        # All processes alike: the signal need not have come to each of them, or not before the same step.
        if not trainer.strategy.reduce_boolean_decision(self._asked, all=False):
            return
        kept = trainer.checkpoint_callback
        if isinstance(kept, ModelCheckpoint) and kept.dirpath:
            trainer.save_checkpoint(Path(kept.dirpath) / f"{kept.CHECKPOINT_NAME_LAST}.ckpt")
        if moments.validates_next(trainer):
            return  # Its figures would be missing from the run; the next step is the last one.
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            # torch takes a KeyboardInterrupt in a process it made for a good end, and its parent waits for a result.
            raise SystemExit(STOPPED)
        raise KeyboardInterrupt

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop listening."""
        self._put_back()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop listening."""
        self._put_back()
