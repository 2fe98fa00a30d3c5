"""Checkpoints that are whole or not there, and the note that says which is best."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from memtx import files
from memtx.checkpoint import checksummed_zip, pretrained, sharded
from memtx.errors import check_at_least
from memtx.training.callbacks import trainer_state

BEST_FILE = "best.json"
"""The note's name, beside the checkpoints."""

_EARLIER_NAME = re.compile(r"earlier-(\d{8,})\.ckpt")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Written to a temporary name, synced, renamed; with a digest of every byte, and read without unpickling code.

    Lightning's own writes through a move but without a sync, so that a power cut can leave an empty file
    under the right name, and what reads it does not notice a flipped bit.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write ``checkpoint`` whole, or leave what was there.

        Raises:
            MemtxError: the file cannot be written.
        """
        place = Path(path)
        # A run that goes on from what several processes wrote: a file cannot be renamed over a folder.
        beside = place.with_name(f".{place.name}.file") if sharded.is_sharded(place) else place
        with checksummed_zip.create(beside, int(checkpoint.get("global_step", 0))) as handle:
            torch.save(checkpoint, cast(IO[bytes], handle))
        if beside != place:
            files.replace(beside, place)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            CheckpointError: missing, damaged, or not such a file.
        """
        return pretrained.read_checkpoint(path)

    def run_after_writes(self, callback: Callable[[], None]) -> None:
        """Call a function when all that was given is written: at once, since it is."""
        callback()


class BestCheckpoint(ModelCheckpoint):
    """Keeps the best and the last checkpoint of a run, and notes which is best in best.json.

    last.ckpt is written at every validation, at the end, and every so many steps if asked to; always after an optimiser
    step, so that a run goes on from it exactly. What it replaces stays as earlier-N.ckpt, of step N, for a run whose
    last one is damaged. The best one is kept as it was validated. Where a run has no validation, there is no best one,
    and last.ckpt is also written when an epoch ends. While a guard sees the run in trouble, nothing is written.

    Args:
        dirpath: folder; by default ``checkpoints`` in the run's folder.
        monitor: the validation's metric; null for the newest validated one.
        mode: "min" or "max".
        every_n_train_steps: optimiser steps between checkpoints; None for at validation and the end alone.
        keep_last: how many of the newest stay, last.ckpt among them, the best one apart; at least 1.

    Raises:
        MemtxError: a number is below 1.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        monitor: str | None = "val_bits_per_byte",
        mode: str = "min",
        every_n_train_steps: int | None = None,
        keep_last: int = 2,
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
        check_at_least(
            1,
            keep_last=keep_last,
            **({} if every_n_train_steps is None else {"every_n_train_steps": every_n_train_steps}),
        )
        self.save_every_n_steps, self.keep_last = every_n_train_steps, keep_last
        self._save_pending = False
        self._owns_last = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the folder; a last.ckpt in it is worth keeping where the run goes on from it."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero:
            files.remove_temporary_files(self._last_path.parent)
        begin = trainer.ckpt_path
        self._owns_last = begin is not None and Path(begin).absolute() == self._last_path.absolute()

    @property
    def _last_path(self) -> Path:
        return Path(str(self.dirpath)) / f"{self.CHECKPOINT_NAME_LAST}.ckpt"

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the last checkpoint where one is due and no validation is about to do so."""
        if not trainer_state.has_stepped(trainer):
            return
        due = self._save_pending or (
            self.save_every_n_steps is not None and trainer.global_step % self.save_every_n_steps == 0
        )
        due = (
            due
            or trainer_state.is_last_step(trainer)
            or (self._never_validates(trainer) and self._is_epoch_end(trainer))
        )
        if due and trainer_state.is_unstable(trainer) and not trainer_state.is_last_step(trainer):
            self._save_pending = True
        elif due and not trainer_state.will_validate(trainer) and not self._should_skip_saving_checkpoint(trainer):
            self._save_pending = False
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
        self._save_pending = not trainer_state.has_stepped(trainer) or trainer_state.is_unstable(trainer)
        if not self._save_pending:
            self._save_last_checkpoint(trainer, candidates)
        if trainer.is_global_zero and self.best_model_path:
            best = Path(self.best_model_path)
            score = None if self.best_model_score is None else float(self.best_model_score)
            note = {"path": best.name, "monitor": self.monitor, "score": score}
            _run_after_writes(trainer, partial(files.write_json, best.parent / BEST_FILE, note))

    def _save_last_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        for logger in trainer.loggers:
            logger.save()  # A run that goes on from here does not log again what was logged before it.
        if trainer.is_global_zero and self._owns_last and self.keep_last > 1:
            _run_after_writes(trainer, partial(_keep_earlier, self._last_path))
        super()._save_last_checkpoint(trainer, monitor_candidates)
        self._owns_last = True
        if trainer.is_global_zero:
            _run_after_writes(
                trainer, partial(_prune_earlier, self._last_path.parent, self.keep_last - 1, trainer.global_step)
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave it to the run's last batch."""

    @staticmethod
    def _never_validates(trainer: pl.Trainer) -> bool:
        return not trainer.enable_validation or not sum(trainer.num_val_batches)

    @staticmethod
    def _is_epoch_end(trainer: pl.Trainer) -> bool:
        return bool(trainer.fit_loop.epoch_loop._num_ready_batches_reached())


def _run_after_writes(trainer: pl.Trainer, callback: Callable[[], None]) -> None:
    writes = trainer.strategy.checkpoint_io
    # Somebody else's plugin is taken to have written when it returns.
    writes.run_after_writes(callback) if isinstance(writes, AtomicCheckpointIO) else callback()


def _keep_earlier(last_path: Path) -> None:
    """Give the last checkpoint a second name, under which it stays when the next one takes its place."""
    if (step := checksummed_zip.read_step(last_path)) is None:
        return
    with files.atomic_path(last_path.with_name(f"earlier-{step:08d}.ckpt")) as temporary:
        try:
            os.link(last_path, temporary)
        except OSError:  # a file system without second names
            shutil.copyfile(last_path, temporary)


def _prune_earlier(checkpoint_dir: Path, num_kept: int, step: int) -> None:
    # Those of later steps are of before the run went back to an earlier one: they are counted once it is past them.
    found = [(int(name[1]), path) for path in checkpoint_dir.iterdir() if (name := _EARLIER_NAME.fullmatch(path.name))]
    for _, path in sorted(one for one in found if one[0] <= step)[::-1][num_kept:]:
        path.unlink(missing_ok=True)
