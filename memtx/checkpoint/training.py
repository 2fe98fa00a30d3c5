"""Lightning plugins and callback for training checkpoints: atomic files, and a note that names the best."""

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
from memtx.checkpoint import checksummed_zip, pretrained, sharded, trainer_state
from memtx.checkpoint.whole_step import WholeStep, is_between_steps
from memtx.errors import MemtxError, check_at_least

BEST_FILE = "best.json"
"""File beside the checkpoints that names the best."""

_EARLIER_NAME = re.compile(r"earlier-(\d{8,})\.ckpt")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes atomically with a checksum of every byte, and reads without unpickling code.

    Lightning's plugin moves a file into place without syncing it, so that a power cut can leave an empty file under the
    right name, and does not notice a flipped bit when reading.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write ``checkpoint`` completely, or leave the previous file and raise MemtxError."""
        target = Path(path)
        # A run that resumes from a sharded checkpoint: a file cannot be renamed over a folder.
        written = target.with_name(f".{target.name}.file") if sharded.is_sharded(target) else target
        with checksummed_zip.create(written, int(checkpoint.get("global_step", 0))) as handle:
            torch.save(checkpoint, cast(IO[bytes], handle))
        if written != target:
            files.replace(written, target)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; raises CheckpointError if it is missing, damaged, or not a checkpoint."""
        return pretrained.read_checkpoint(path)

    def run_after_writes(self, callback: Callable[[], None]) -> None:
        """Call a function after all pending writes: here at once."""
        callback()


class BestCheckpoint(ModelCheckpoint):
    """Keeps the best and the last checkpoints of a run, and names the best in best.json.

    last.ckpt is written at every validation, at the end, and every ``every_n_train_steps``; always after an optimizer
    step, so that a run resumes from it exactly. It holds the last whole step however the run ends: at its limits, by
    ``should_stop``, or by an exception, unless several processes would have to agree. The checkpoint that it replaces
    stays as earlier-N.ckpt (of step N), in case last.ckpt is damaged. The best checkpoint is stored as it was
    validated. A run without validation has no best checkpoint and also writes last.ckpt after each epoch. While a guard
    reports an unstable run, nothing is written.

    Args:
        dirpath: Folder of the checkpoints. Defaults to ``checkpoints`` in the run folder.
        monitor: Validation metric that ranks checkpoints; null keeps the newest validated one.
        mode: "min" or "max".
        every_n_train_steps: Optimizer steps between checkpoints. None saves only at validations and at the end.
        keep_last: Number of newest checkpoints to keep, including last.ckpt but not the best, at least 1.

    Raises:
        MemtxError: A number is below 1.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        monitor: str | None = "val_bits_per_byte",
        mode: str = "min",
        every_n_train_steps: int | None = None,
        keep_last: int = 2,
    ) -> None:
        # Lightning's own every_n_train_steps would rank by the previous validation and wait for the first one.
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
        check_at_least(1, keep_last=keep_last)
        if every_n_train_steps is not None:
            check_at_least(1, every_n_train_steps=every_n_train_steps)
        self.save_every_n_steps, self.keep_last = every_n_train_steps, keep_last
        self._save_pending = False
        self._owns_last = False
        self._last_saved_step = -1
        self._whole_step: WholeStep | None = None
        self._is_updating = self._saves_whole_step = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Resolve the folder; if the run resumes from its last.ckpt, that is kept as an earlier checkpoint."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero:
            files.remove_temporary_files(self._last_path.parent)
        resume_path = trainer.ckpt_path
        self._owns_last = resume_path is not None and Path(resume_path).absolute() == self._last_path.absolute()

    @property
    def _last_path(self) -> Path:
        return Path(str(self.dirpath)) / f"{self.CHECKPOINT_NAME_LAST}.ckpt"

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write last.ckpt if it is due and no validation is about to write it."""
        if not trainer_state.has_stepped(trainer):
            return
        self._is_updating = False
        # An unstable run keeps its last checkpoint.
        self._whole_step = None if trainer_state.is_unstable(trainer) else WholeStep.capture(trainer)
        is_last_step, interval = trainer_state.is_last_step(trainer), self.save_every_n_steps
        never_validates = not trainer.enable_validation or not sum(trainer.num_val_batches)
        is_due = (
            self._save_pending
            or (interval is not None and trainer.global_step % interval == 0)
            or is_last_step
            or (never_validates and bool(trainer.fit_loop.epoch_loop._num_ready_batches_reached()))
        )
        if is_due and trainer_state.is_unstable(trainer) and not is_last_step:
            self._save_pending = True
        elif is_due and not trainer_state.will_validate(trainer) and not self._should_skip_saving_checkpoint(trainer):
            self._save_pending = False
            self.save_now(trainer)

    def save_now(self, trainer: pl.Trainer) -> None:
        """Write last.ckpt now; the current batch must have ended in an optimizer step."""
        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_before_optimizer_step(self, *_: Any) -> None:
        """Note that the weights are about to change."""
        self._is_updating = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write last.ckpt if the run stops here; else, the epoch's last batch has saved."""
        if trainer.should_stop:
            self._save_whole_step(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the validated checkpoint if it is the best, then write last.ckpt."""
        if getattr(trainer, "fast_dev_run", False) or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        candidates = self._monitor_candidates(trainer)
        self._save_topk_checkpoint(trainer, candidates)
        # In the middle of an accumulation, gradients would be lost, so the end of the next step saves instead.
        self._save_pending = not trainer_state.has_stepped(trainer) or trainer_state.is_unstable(trainer)
        if not self._save_pending:
            self._save_last_checkpoint(trainer, candidates)
        if trainer.is_global_zero and self.best_model_path:
            best = Path(self.best_model_path)
            score = None if self.best_model_score is None else float(self.best_model_score)
            note = {"path": best.name, "monitor": self.monitor, "score": score}
            _run_after_writes(trainer, partial(files.write_json, best.parent / BEST_FILE, note))

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        if self._whole_step is None or not self._saves_whole_step:
            super()._save_checkpoint(trainer, filepath)
            return
        trainer.strategy.save_checkpoint(self._whole_step.dump_checkpoint(trainer), filepath)
        self._last_global_step_saved, self._last_checkpoint_saved = self._whole_step.global_step, filepath

    def _save_whole_step(self, trainer: pl.Trainer) -> None:
        """Write last.ckpt of the last whole step, unless it exists or the weights have changed since."""
        if (
            getattr(trainer, "fast_dev_run", False)
            or trainer.state.fn != TrainerFn.FITTING
            or trainer_state.is_unstable(trainer)
        ):
            return
        if is_between_steps(trainer):
            if trainer.global_step > self._last_saved_step:
                self.save_now(trainer)
        elif self._whole_step and not self._is_updating and self._whole_step.global_step > self._last_saved_step:
            self._saves_whole_step = True
            try:
                self.save_now(trainer)
            finally:
                self._saves_whole_step = False

    def _save_last_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        for logger in trainer.loggers:
            logger.save()  # so that a resumed run does not log the same steps again
        if trainer.is_global_zero and self._owns_last and self.keep_last > 1:
            _run_after_writes(trainer, partial(_keep_earlier, self._last_path))
        super()._save_last_checkpoint(trainer, monitor_candidates)
        self._owns_last = True
        self._last_saved_step = self._last_global_step_saved
        if trainer.is_global_zero:
            prune = partial(_prune_earlier, self._last_path.parent, self.keep_last - 1, trainer.global_step)
            _run_after_writes(trainer, prune)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write last.ckpt if the run was stopped after the callbacks of its last batch, or within a step."""
        self._save_whole_step(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write last.ckpt of the last whole step; several processes cannot agree on one any more."""
        if trainer.world_size > 1:
            return
        try:
            self._save_whole_step(trainer)
        except (MemtxError, OSError, RuntimeError) as error:  # The first error is the one to report.
            trainer_state.write_status(trainer, f"The last step could not be saved: {error}")


def find_best_checkpoint(trainer: pl.Trainer) -> BestCheckpoint | None:
    """Return the trainer's ``BestCheckpoint``, whatever other checkpoint callbacks it has; None without one."""
    callbacks = cast(list[Any], trainer.checkpoint_callbacks)
    return next((callback for callback in callbacks if isinstance(callback, BestCheckpoint)), None)


def _run_after_writes(trainer: pl.Trainer, callback: Callable[[], None]) -> None:
    plugin = trainer.strategy.checkpoint_io
    # Another plugin is assumed to have written when it returns.
    plugin.run_after_writes(callback) if isinstance(plugin, AtomicCheckpointIO) else callback()


def _keep_earlier(last_path: Path) -> None:
    """Link the last checkpoint to a second name, which remains when the next one replaces it."""
    if (step := checksummed_zip.read_step(last_path)) is None:
        return
    with files.atomic_path(last_path.with_name(f"earlier-{step:08d}.ckpt")) as temporary:
        try:
            os.link(last_path, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(last_path, temporary)


def _prune_earlier(folder: Path, num_kept: int, step: int) -> None:
    """Remove all but the newest ``num_kept`` earlier checkpoints, not counting those of later steps.

    Checkpoints of later steps were written before the run went back; they count once the run is past them.
    """
    earlier = [(int(match[1]), path) for path in folder.iterdir() if (match := _EARLIER_NAME.fullmatch(path.name))]
    for _, path in sorted(entry for entry in earlier if entry[0] <= step)[::-1][num_kept:]:
        path.unlink(missing_ok=True)
