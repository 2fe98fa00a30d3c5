"""Lossless interruption: finish and save the current step, then stop the run or requeue its job."""

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

from memtx.checkpoint import trainer_state
from memtx.checkpoint.training import find_best_checkpoint
from memtx.training import slurm

INTERRUPT_EXIT_CODE = 130
"""Exit code of an interrupted process that the trainer forked or spawned: 128 plus the number of SIGINT."""


class StopOnInterrupt(pl.Callback):
    """On Ctrl-C, SIGTERM or SIGUSR1, saves a checkpoint at the next optimizer step of all processes and stops.

    A second Ctrl-C stops at once, unless a launcher forwards the first one twice. In a SLURM job, the signal that
    announces its end (``--signal=SIGUSR1@90``) requeues the job.
    """

    def __init__(self) -> None:
        self._stop_requested = self._requeue_requested = self._launched_externally = False
        self._requeue_signal: int = signal.SIGUSR1
        self._previous_handlers: dict[int, Any] = {}
        self._original_requeue_handler: Any = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """In a SLURM job, install the handler before Lightning's, which would save in the middle of a step."""
        environment = getattr(trainer.strategy, "cluster_environment", None)
        self._launched_externally = environment is not None and environment.creates_processes_externally
        if isinstance(environment, SLURMEnvironment):
            if environment.requeue_signal is not None:
                self._requeue_signal = environment.requeue_signal
            self._install_handlers(self._requeue_signal)
            self._original_requeue_handler = self._previous_handlers.get(self._requeue_signal)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the handlers; Python allows it in the main thread only."""
        self._install_handlers(signal.SIGINT, signal.SIGTERM, self._requeue_signal)

    def _install_handlers(self, *signums: int) -> None:
        if threading.current_thread() is threading.main_thread():
            for signum in signums:
                self._previous_handlers.setdefault(signum, signal.signal(signum, self._handle_signal))

    def _handle_signal(self, signum: int, frame: FrameType | None) -> None:
        self._stop_requested = True
        self._requeue_requested |= signum == self._requeue_signal
        if signum == signal.SIGINT and not self._launched_externally:
            signal.signal(signum, self._previous_handlers.pop(signum))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Save and stop if requested, unless accumulated gradients would be lost."""
        if not trainer_state.has_stepped(trainer):
            return
        # Agreed on by all processes, as the signal may reach only some of them, or at different steps.
        if not trainer.strategy.reduce_boolean_decision(self._stop_requested, all=False):
            return
        callback = trainer.checkpoint_callback
        if (best_checkpoint := find_best_checkpoint(trainer)) is not None:
            best_checkpoint.save_now(trainer)
        elif isinstance(callback, ModelCheckpoint) and callback.dirpath:
            trainer.save_checkpoint(Path(callback.dirpath) / f"{callback.CHECKPOINT_NAME_LAST}.ckpt")
        if trainer_state.will_validate(trainer):
            return  # The run would lack its metrics; stop after the next step.
        if trainer.strategy.reduce_boolean_decision(self._requeue_requested, all=False):
            self._requeue_job(trainer)
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            # torch takes a KeyboardInterrupt in its child process for success, and the parent waits for a result.
            raise SystemExit(INTERRUPT_EXIT_CODE)
        raise KeyboardInterrupt

    @staticmethod
    def _requeue_job(trainer: pl.Trainer) -> None:
        environment, job_id = getattr(trainer.strategy, "cluster_environment", None), slurm.get_job_id(os.environ)
        auto_requeue = not isinstance(environment, SLURMEnvironment) or environment.auto_requeue
        if job_id is not None and auto_requeue and trainer.is_global_zero:
            slurm.requeue(job_id)
            rank_zero_info(f"The checkpoint is written, and SLURM job {job_id} is requeued.")

    def on_train_end(self, *_: Any) -> None:
        """Restore the previous handlers."""
        for signum, handler in self._previous_handlers.items():
            signal.signal(signum, handler)
        self._previous_handlers.clear()

    def on_exception(self, *_: Any) -> None:
        """Restore the previous handlers."""
        self.on_train_end()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the handler that Lightning took for the original one, which was ours."""
        if self._original_requeue_handler is not None:
            signal.signal(self._requeue_signal, self._original_requeue_handler)
