"""Steps whose loss or gradient is not finite: skipped, counted, and too many in a row stop the run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from memtx.errors import MemtxError, check_at_least
from memtx.training import nonfinite_trace
from memtx.training.callbacks import trainer_state
from memtx.training.carry import get_carry


class SkipNonFinite(pl.Callback):
    """Skips an optimiser step whose loss or gradient is not finite, and stops after too many in a row.

    A skipped step changes neither weights nor the optimiser's state, and the memory that is carried goes on as it was
    before the step's first batch: what the step read is not in it. A row begins fresh where what is skipped holds the
    beginning of a document, or where the memory was no longer finite itself. The step counts as one of the run's, so
    that schedule and data position go on. All processes skip alike.

    Logs ``grad_norm``, before clipping, and ``skipped_steps``, of the whole run, once there is one.

    It looks once an optimiser step, between backward pass and update, which on a GPU waits for the backward pass.
    With ``precision: 16-mixed`` a gradient that overflows is the scaler's to skip, and not counted here.

    Args:
        patience: steps in a row that may be skipped before the run stops.

    Attributes:
        num_skipped: steps skipped in the whole run.
        num_consecutive: steps skipped since the last good one.

    Raises:
        MemtxError: patience is below 1; while training, more steps in a row are not finite than that.
    """

    def __init__(self, patience: int = 10) -> None:
        check_at_least(1, patience=patience)
        self.patience = patience
        self.num_skipped = self.num_consecutive = 0
        self._losses: list[Tensor] = []
        self._batch: Any = None
        self._document_starts: list[Tensor] = []
        self._nonfinite_source = ""

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return {"num_skipped": self.num_skipped, "num_consecutive": self.num_consecutive}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on."""
        self.num_skipped, self.num_consecutive = state_dict["num_skipped"], state_dict["num_consecutive"]

    @property
    def is_unstable(self) -> bool:
        """Whether the newest step was skipped."""
        return self.num_consecutive > 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Have the memory remembered as it is before a step's first batch."""
        self._batch = batch
        if (carry := get_carry(pl_module)) is None:
            return
        if not self._losses:
            carry.snapshot("train")
            self._document_starts.clear()
        self._document_starts.append(batch.document_starts)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Remember the loss, (); a step has as many as batches are accumulated."""
        self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Look, and take the gradients away if the step is not to be."""
        losses, self._losses = self._losses, []
        norm = _compute_grad_norm(optimizer)
        pl_module.log("grad_norm", norm)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        looked = losses if scaler is not None else [*losses, norm]
        wrong = ~torch.stack([one.float() for one in looked]).isfinite().all()
        if trainer.world_size > 1:
            wrong = trainer.strategy.reduce(wrong.float(), reduce_op="sum")
        if not bool(wrong):
            self.num_consecutive, self._batch = 0, None
            return
        self._skip_step(trainer, pl_module, optimizer, losses, norm)

    def _skip_step(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        optimizer: torch.optim.Optimizer,
        losses: list[Tensor],
        grad_norm: Tensor,
    ) -> None:
        carry = get_carry(module)
        if carry is not None:
            carry.rollback("train")
        if not self.num_consecutive:
            self._nonfinite_source = nonfinite_trace.find_first_nonfinite(trainer, module, self._batch)
        if carry is not None:
            carry.rollback("train", torch.cat(self._document_starts, dim=1).any(1))
        # An optimiser leaves alone, with all it knows of it, what has no gradient.
        optimizer.zero_grad(set_to_none=True)
        self.num_skipped, self.num_consecutive, self._batch = self.num_skipped + 1, self.num_consecutive + 1, None
        module.log("skipped_steps", float(self.num_skipped))
        bad = next((f"loss is {float(one)}" for one in losses if not one.isfinite()), None)
        what = bad or (
            f"gradient's norm is {float(grad_norm)}" if not grad_norm.isfinite() else "loss of another process is nan"
        )
        if self.num_consecutive >= self.patience:
            raise MemtxError(
                f"The {what} at step {trainer.global_step}, and {self.num_consecutive} steps in a row were skipped for "
                f"that. {self._nonfinite_source}",
                "Training diverged: lower the learning rate, warm up longer or clip the gradient; the run's last "
                "checkpoint is from before.",
            )
        trainer_state.write_status(
            trainer,
            f"The {what}: the step is skipped, and the memory goes on as before it "
            f"({self.num_consecutive} in a row, {self.num_skipped} in all). {self._nonfinite_source}",
        )


def _local_gradients(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if (gradient := parameter.grad) is not None:
                yield gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _compute_grad_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """Return the norm of all gradients, or of this process' part of them, (); not finite if one of them is not."""
    return torch.nn.utils.get_total_norm(list(_local_gradients(optimizer)))
