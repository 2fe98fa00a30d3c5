"""Checkpoints that are whole or not there, and the note that says which is best."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn

from memtx import files
from memtx.errors import MemtxError
from memtx.models import folder, sharded
from memtx.training.callbacks import moments

BEST = "best.json"
"""The note's name, beside the checkpoints."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Written to a temporary name, synced, renamed; read without unpickling code.

    Lightning's own writes through a move but without a sync, so that a power cut can leave an empty file
    under the right name.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write ``checkpoint`` whole, or leave what was there."""
        place = Path(path)
        # A run that goes on from what several processes wrote: a file cannot be renamed over a folder.
        beside = place.with_name(f".{place.name}.file") if sharded.is_sharded(place) else place
        with files.atomic_path(beside) as temporary:
            torch.save(checkpoint, temporary)
        if beside != place:
            files.replace(beside, place)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            CheckpointError: missing, damaged, or not such a file.
        """
        return folder.read_checkpoint(path)


class BestCheckpoint(ModelCheckpoint):
    """Keeps the best and the last checkpoint of a run, and notes which is best in best.json.

    last.ckpt is written at every validation, at the end, and every so many steps if asked to; always after an optimiser
    step, so that a run goes on from it exactly. The best one is kept as it was validated. Where a run has no
    validation, there is last.ckpt alone, and it is also written when an epoch ends.

    Args:
        dirpath: folder; by default ``checkpoints`` in the run's folder.
        monitor: the validation's metric; null for the newest validated one.
        mode: "min" or "max".
        every_n_train_steps: optimiser steps between checkpoints; None for at validation and the end alone.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        monitor: str | None = "val_bits_per_byte",
        mode: str = "min",
        every_n_train_steps: int | None = None,
    ) -> None:
        # Steps are looked at here: Lightning's would rank them by the validation before, and wait for the first one.
        super().__init__(
            dirpath=dirpath,
            filename="step-{step:08d}",
            auto_insert_metric_name=False,
            monitor=monitor,
            mode=mode,
            save_top_k=1,
            save_last=True,
            enable_version_counter=False,
        )
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise MemtxError(
                f"every_n_train_steps is {every_n_train_steps}.", "Give at least 1, or null for at validation alone."
            )
        self.every = every_n_train_steps
        self._owes = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the last checkpoint where one is due and no validation is about to do so."""
        if not moments.has_stepped(trainer):
            return
        due = self._owes or (self.every is not None and trainer.global_step % self.every == 0)
        due = due or moments.is_last_step(trainer) or (self._never_validates(trainer) and self._ends_epoch(trainer))
        if due and not moments.validates_next(trainer) and not self._should_skip_saving_checkpoint(trainer):
            self._owes = False
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave it to the epoch's last batch."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep what was validated if it is the best, then write the last checkpoint."""
        if getattr(trainer, "fast_dev_run", False) or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        candidates = self._monitor_candidates(trainer)
        self._save_topk_checkpoint(trainer, candidates)
        # In the middle of an accumulation, gradients would be lost: the next step's end is saved instead.
        self._owes = not moments.has_stepped(trainer)
        if not self._owes:
            self._save_last_checkpoint(trainer, candidates)
        if trainer.is_global_zero and self.best_model_path:
            best = Path(self.best_model_path)
            score = None if self.best_model_score is None else float(self.best_model_score)
            files.write_json(best.parent / BEST, {"path": best.name, "monitor": self.monitor, "score": score})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave it to the run's last batch."""

    @staticmethod
    def _never_validates(trainer: pl.Trainer) -> bool:
        return not trainer.enable_validation or not sum(trainer.num_val_batches)

    @staticmethod
    def _ends_epoch(trainer: pl.Trainer) -> bool:
        return bool(trainer.fit_loop.epoch_loop._num_ready_batches_reached())
