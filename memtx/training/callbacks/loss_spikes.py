"""Recovery from loss spikes: restore earlier weights and skip the data that caused the spike.

PaLM was trained this way (Chowdhery et al. 2022, section 5.1): from a checkpoint about 100 steps before the spike and
without the batches around it, the spikes did not recur.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from memtx.checkpoint import recovery, trainer_state
from memtx.checkpoint.training import find_best_checkpoint
from memtx.errors import CheckpointError, MemtxError, check_at_least, check_positive
from memtx.training.carry import get_carry
from memtx.training.fsdp import FullyShardedStrategy

NUM_RECENT = 8
"""Number of recent losses, more than half of which must be high, because one hard batch is no spike."""

MIN_RELATIVE_RISE = 0.1
"""Smallest rise of a spike relative to the loss, however steady the loss was."""


class RewindOnSpike(pl.Callback):
    """Restores the newest checkpoint from before a spike of the loss and continues with the data after it.

    A spike is when more than half of the last 8 losses exceed the median of those before by ``factor`` times their
    spread (1.4826 times the median absolute deviation, the standard deviation of a normal distribution) and by a tenth.

    Only weights and optimizer state are restored. Step, schedule, random state and data position stay, so the data read
    since the checkpoint is skipped, and a killed run that resumes does the same bit for bit. The carried memory starts
    fresh. While the loss is high no checkpoint is written, so that the newest is from before the spike.

    Not enabled by default, because with few streams a run may meet a document that is this hard.

    Args:
        factor: Rise of the loss in spreads.
        window: Number of losses to compare with; no spike is detected before there are as many.
        max_rewinds: Number of spikes after which another one stops the run.

    Raises:
        MemtxError: A number is too small; in training, there are more than ``max_rewinds`` spikes.
    """

    def __init__(self, factor: float = 6.0, window: int = 128, max_rewinds: int = 5) -> None:
        check_at_least(NUM_RECENT, window=window)
        check_at_least(1, max_rewinds=max_rewinds)
        check_positive(factor=factor)
        self.factor, self.window, self.max_rewinds = factor, window, max_rewinds
        self.num_rewinds = 0
        self._losses: list[tuple[int, float]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raise MemtxError if the weights are sharded."""
        if isinstance(trainer.strategy, FullyShardedStrategy):
            raise MemtxError(
                "RewindOnSpike does not support fsdp2, which shards the weights.",
                "Remove RewindOnSpike, or use --trainer.strategy ddp.",
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the recent losses and the number of rewinds."""
        return {"losses": [list(entry) for entry in self._losses], "num_rewinds": self.num_rewinds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the recent losses and the number of rewinds."""
        self._losses = [(int(step), float(loss)) for step, loss in state_dict["losses"]]
        self.num_rewinds = int(state_dict["num_rewinds"])

    @property
    def is_unstable(self) -> bool:
        """True if the last loss is high, so that a checkpoint might be of a spike."""
        return len(self._losses) == self.window + NUM_RECENT and self._losses[-1][1] > self._upper_bound()

    def _upper_bound(self) -> float:
        return loss_upper_bound([loss for _, loss in self._losses[:-NUM_RECENT]], self.factor)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        """Compare the loss with earlier ones and rewind after a spike."""
        loss = float(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean"))
        if math.isfinite(loss):  # SkipNonFinite handles others.
            self._losses.append((trainer.global_step, loss))
            del self._losses[: -(self.window + NUM_RECENT)]
        if len(self._losses) < self.window + NUM_RECENT or not trainer_state.has_stepped(trainer):
            return
        bound = self._upper_bound()
        high = [entry for entry in self._losses[-NUM_RECENT:] if entry[1] > bound]
        if len(high) > NUM_RECENT // 2:
            del self._losses[self._losses.index(high[0]) :]
            self._rewind(trainer, pl_module, high[0][0] - 1, f"The loss rose above {bound:.4g}, to {high[-1][1]:.4g}")

    def _rewind(self, trainer: pl.Trainer, module: pl.LightningModule, max_step: int, reason: str) -> None:
        if self.num_rewinds == self.max_rewinds:
            raise MemtxError(
                f"{reason} at step {trainer.global_step}, spike {self.max_rewinds + 1} of this run.",
                "Lower the learning rate, or raise max_rewinds of RewindOnSpike.",
            )
        self.num_rewinds += 1
        recovered = _find_checkpoint_before(trainer, max_step)
        if recovered is None:
            trainer_state.write_status(trainer, f"{reason}, and no checkpoint from before it exists.")
            return
        _restore_weights(trainer, recovered.content)
        if (carry := get_carry(module)) is not None:
            carry.reset("train")
        trainer_state.write_status(
            trainer,
            f"{reason}: continuing from the weights of step {recovered.step} ('{recovered.path}') and the next data.",
        )


def loss_upper_bound(losses: Sequence[float], factor: float) -> float:
    """Return the bound above which a loss is high: ``factor`` spreads, at least a tenth, above the median."""
    median = statistics.median(losses)
    spread = 1.4826 * statistics.median(abs(loss - median) for loss in losses)
    return median + max(factor * spread, MIN_RELATIVE_RISE * abs(median))


def _find_checkpoint_before(trainer: pl.Trainer, max_step: int) -> recovery.RecoveredCheckpoint | None:
    callback = find_best_checkpoint(trainer) or trainer.checkpoint_callback
    if not isinstance(callback, ModelCheckpoint) or not callback.dirpath:
        return None
    # Waits for checkpoints that are written in the background.
    trainer.strategy.checkpoint_io.teardown()
    trainer.strategy.barrier("checkpoints are written")
    try:
        return recovery.find_latest_valid(Path(callback.dirpath), max_step=max_step)
    except CheckpointError:
        return None


def _restore_weights(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    current_groups = [[dict(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers]
    trainer.strategy.load_model_state_dict(checkpoint, strict=True)
    trainer.strategy.load_optimizer_state_dict(checkpoint)
    for optimizer, groups in zip(trainer.optimizers, current_groups, strict=True):
        for group, settings in zip(optimizer.param_groups, groups, strict=True):
            # The schedule continues, so the learning rates are those of this step.
            group.update({name: value for name, value in settings.items() if name != "params"})
