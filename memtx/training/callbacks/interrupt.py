"""A signal without loss: the batch in hand is finished, its end is saved, then the run stops or its job is requeued."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_info

from memtx.training import slurm
from memtx.training.callbacks import trainer_state

INTERRUPT_EXIT_CODE = 130
"""The exit code of a process that the trainer forked or spawned, where it was interrupted: 128 and SIGINT's number."""


class StopOnInterrupt(pl.Callback):
    """Turns Ctrl-C, SIGTERM or SIGUSR1 into a save at the next optimiser step of all processes, and then a stop.

    A second Ctrl-C stops at once, where no launcher passes the first one on a second time. In a job of SLURM, the
    signal that it was told to send before it ends the job (``--signal=SIGUSR1@90``) puts the job back into the queue.
    """

    def __init__(self) -> None:
        self._stop_requested = self._requeue_requested = self._launched_externally = False
        self._requeue_signal: int = signal.SIGUSR1
        self._previous_handlers: dict[int, Any] = {}
        self._original_requeue_handler: Any = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """In a job of SLURM, come before Lightning, which would save within the handler, wherever the step stands."""
        environment = getattr(trainer.strategy, "cluster_environment", None)
        self._launched_externally = environment is not None and environment.creates_processes_externally
        if isinstance(environment, SLURMEnvironment):
            if environment.requeue_signal is not None:
                self._requeue_signal = environment.requeue_signal
            self._install_handlers(self._requeue_signal)
            self._original_requeue_handler = self._previous_handlers.get(self._requeue_signal)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen, where a process can (the main thread)."""
        self._install_handlers(signal.SIGINT, signal.SIGTERM, self._requeue_signal)

    def _install_handlers(self, *signums: int) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in signums:
                self._previous_handlers.setdefault(number, signal.signal(number, self._handle_signal))

    def _handle_signal(self, signum: int, frame: FrameType | None) -> None:
        self._stop_requested = True
        self._requeue_requested |= signum == self._requeue_signal
        if signum == signal.SIGINT and not self._launched_externally:
            signal.signal(signum, self._previous_handlers.pop(signum))

    def _restore_handlers(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers.clear()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop, if asked to and no accumulated gradient would be lost."""
        if not trainer_state.has_stepped(trainer):
            return
        # All processes alike: the signal need not have come to each of them, or not before the same step.
        if not trainer.strategy.reduce_boolean_decision(self._stop_requested, all=False):
            return
        kept = trainer.checkpoint_callback
        if isinstance(kept, ModelCheckpoint) and kept.dirpath:
            trainer.save_checkpoint(Path(kept.dirpath) / f"{kept.CHECKPOINT_NAME_LAST}.ckpt")
        if trainer_state.will_validate(trainer):
            return  # Its figures would be missing from the run; the next step is the last one.
        if trainer.strategy.reduce_boolean_decision(self._requeue_requested, all=False):
            self._requeue_job(trainer)
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            # torch takes a KeyboardInterrupt in a process it made for a good end, and its parent waits for a result.
            raise SystemExit(INTERRUPT_EXIT_CODE)
        raise KeyboardInterrupt

    @staticmethod
    def _requeue_job(trainer: pl.Trainer) -> None:
        environment, number = getattr(trainer.strategy, "cluster_environment", None), slurm.get_job_id(os.environ)
        asks = not isinstance(environment, SLURMEnvironment) or environment.auto_requeue
        if number is not None and asks and trainer.is_global_zero:
            slurm.requeue(number)
            rank_zero_info(f"The checkpoint is written, and SLURM's job {number} is back in the queue.")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop listening."""
        self._restore_handlers()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop listening once more: Lightning puts back what it found, which was listening already."""
        if self._original_requeue_handler is not None:
            signal.signal(self._requeue_signal, self._original_requeue_handler)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop listening."""
        self._restore_handlers()
