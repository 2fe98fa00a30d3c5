"""Checkpoints that are whole or not there, and the note that says which is best."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from memtx import files
from memtx.models import folder

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
        with files.atomic_path(path) as temporary:
            torch.save(checkpoint, temporary)

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

    Args:
        dirpath: folder; by default ``checkpoints`` in the run's folder.
        monitor: the metric; where the run has no validation, the newest counts as best.
        mode: "min" or "max".
        every_n_train_steps: optimiser steps between checkpoints; None for at validation alone.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        monitor: str | None = "val_bits_per_byte",
        mode: str = "min",
        every_n_train_steps: int | None = None,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="step-{step:08d}",
            auto_insert_metric_name=False,
            monitor=monitor,
            mode=mode,
            save_top_k=1,
            save_last=True,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
        )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, then note the best."""
        super().on_validation_end(trainer, pl_module)
        self._note(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the last state if it is not saved yet, then note the best."""
        super().on_train_end(trainer, pl_module)
        self._note(trainer)

    def _note(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero and self.best_model_path and not trainer.sanity_checking:
            best = Path(self.best_model_path)
            score = None if self.best_model_score is None else float(self.best_model_score)
            files.write_json(best.parent / BEST, {"path": best.name, "monitor": self.monitor, "score": score})
