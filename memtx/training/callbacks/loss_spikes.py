"""A loss that jumps and stays up: back to the weights from before, and past the data that it jumped on.

As PaLM was trained (Chowdhery et al. 2022, section 5.1): the run went on from a checkpoint of some 100 steps before the
spike without the batches around it, and the spikes did not come again.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from memtx.checkpoint import recovery
from memtx.errors import CheckpointError, MemtxError, check_at_least, check_positive
from memtx.training.callbacks import trainer_state
from memtx.training.carry import get_carry
from memtx.training.fsdp import FullyShardedStrategy

NUM_RECENT = 8
"""The newest losses, of which more than half have to be up: one hard batch is no spike."""

MIN_RELATIVE_RISE = 0.1
"""Of the loss: a rise by less is none, however steady the loss was."""


class RewindOnSpike(pl.Callback):
    """Goes back to the newest checkpoint from before a spike of the loss, and goes on with the data after it.

    A spike is there when more than half of the last 8 losses are above the median of those before by ``factor`` times
    their spread (1.4826 times the median deviation: a normal distribution's standard deviation) and by a tenth.

    Weights and the optimiser's state are then those of the checkpoint. All else stays where it is: the step, the
    schedule, random numbers and the data's position, so that what was read since the checkpoint is passed over and a
    run that is killed and goes on does the same again, to the bit. The carried memory begins fresh, as at a document's
    beginning. While the loss is up no checkpoint is written, so that the newest is from before.

    Not on by default: on few rows a run may meet a document that is that hard.

    Args:
        factor: spreads that the loss rises.
        window: losses that it is compared with; nothing is a spike before there are as many.
        max_rewinds: spikes of a run after which it stops.

    Raises:
        MemtxError: a number is too small; while training, there is one spike more than ``max_rewinds``.
    """

    def __init__(self, factor: float = 6.0, window: int = 128, max_rewinds: int = 5) -> None:
        check_at_least(NUM_RECENT, window=window)
        check_at_least(1, max_rewinds=max_rewinds)
        check_positive(factor=factor)
        self.factor, self.window, self.max_rewinds = factor, window, max_rewinds
        self.num_rewinds = 0
        self._losses: list[tuple[int, float]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse weights that are shared out.

        Raises:
            MemtxError: each process holds a share of them.
        """
        if isinstance(trainer.strategy, FullyShardedStrategy):
            raise MemtxError(
                "RewindOnSpike goes back to whole weights, and fsdp2 shares them out.",
                "Leave it out, or train with --trainer.strategy ddp.",
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the losses that the next ones are compared with, and the count."""
        return {"losses": [list(one) for one in self._losses], "num_rewinds": self.num_rewinds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them."""
        self._losses = [(int(step), float(loss)) for step, loss in state_dict["losses"]]
        self.num_rewinds = int(state_dict["num_rewinds"])

    @property
    def is_unstable(self) -> bool:
        """Whether the newest loss is up, so that a checkpoint might be of a spike."""
        return len(self._losses) == self.window + NUM_RECENT and self._losses[-1][1] > self._upper_bound()

    def _upper_bound(self) -> float:
        return loss_upper_bound([loss for _, loss in self._losses[:-NUM_RECENT]], self.factor)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare, and go back if it has to be."""
        loss = float(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean"))
        if math.isfinite(loss):  # What is not is another's to skip.
            self._losses.append((trainer.global_step, loss))
            del self._losses[: -(self.window + NUM_RECENT)]
        if len(self._losses) < self.window + NUM_RECENT or not trainer_state.has_stepped(trainer):
            return
        bound = self._upper_bound()
        up = [one for one in self._losses[-NUM_RECENT:] if one[1] > bound]
        if len(up) > NUM_RECENT // 2:
            del self._losses[self._losses.index(up[0]) :]
            self._rewind(trainer, pl_module, up[0][0] - 1, f"The loss rose above {bound:.4g}, to {up[-1][1]:.4g}")

    def _rewind(self, trainer: pl.Trainer, module: pl.LightningModule, max_step: int, reason: str) -> None:
        if self.num_rewinds == self.max_rewinds:
            raise MemtxError(
                f"{reason} at step {trainer.global_step}, the {self.max_rewinds + 1}. spike of this run.",
                "Lower the learning rate, or give RewindOnSpike a higher max_rewinds.",
            )
        self.num_rewinds += 1
        found = _find_checkpoint_before(trainer, max_step)
        if found is None:
            trainer_state.write_status(trainer, f"{reason}, and there is no checkpoint from before it to go back to.")
            return
        _restore_weights(trainer, found.content)
        if (carry := get_carry(module)) is not None:
            carry.reset("train")
        trainer_state.write_status(
            trainer, f"{reason}: going on from '{found.path}', of step {found.step}, past the data read since."
        )


def loss_upper_bound(losses: Sequence[float], factor: float) -> float:
    """Return what later losses do not exceed without being up.

    Args:
        losses: before them.
        factor: spreads above the median that they may be.
    """
    middle = statistics.median(losses)
    spread = 1.4826 * statistics.median(abs(one - middle) for one in losses)
    return middle + max(factor * spread, MIN_RELATIVE_RISE * abs(middle))


def _find_checkpoint_before(trainer: pl.Trainer, max_step: int) -> recovery.RecoveredCheckpoint | None:
    kept = trainer.checkpoint_callback
    if not isinstance(kept, ModelCheckpoint) or not kept.dirpath:
        return None
    # Ends what is being written in the background.
    trainer.strategy.checkpoint_io.teardown()
    trainer.strategy.barrier("checkpoints are written")
    try:
        return recovery.find_latest_valid(Path(kept.dirpath), max_step=max_step)
    except CheckpointError:
        return None


def _restore_weights(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    groups = [[dict(group) for group in one.param_groups] for one in trainer.optimizers]
    trainer.strategy.load_model_state_dict(checkpoint, strict=True)
    trainer.strategy.load_optimizer_state_dict(checkpoint)
    for optimizer, before in zip(trainer.optimizers, groups, strict=True):
        for group, settings in zip(optimizer.param_groups, before, strict=True):
            # The schedule goes on: its rates are this step's, not the checkpoint's.
            group.update({name: value for name, value in settings.items() if name != "params"})
