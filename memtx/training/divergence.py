"""A loss that is no longer finite, noticed before its weights are kept and without making the GPU wait."""

from __future__ import annotations

import torch
from torch import Tensor

from memtx.errors import MemtxError


class FiniteLoss:
    """Looks at each step's loss when the next one begins, and where a checkpoint is about to be written."""

    def __init__(self) -> None:
        self._loss: Tensor | None = None
        self._copy: Tensor | None = None
        self._step = 0

    def watch(self, loss: Tensor, step: int) -> None:
        """Remember the loss, (), of the optimiser step ``step``."""
        self._loss, self._step = loss.detach(), step
        if not loss.is_cuda:
            self._copy = self._loss
            return
        if self._copy is None:
            self._copy = torch.zeros((), dtype=torch.float32, pin_memory=True)
        # Not waited for: what has not arrived when it is looked at is an earlier loss, and seen a step later.
        self._copy.copy_(self._loss, non_blocking=True)

    def check(self, *, wait: bool = False) -> None:
        """Raise if the loss watched last is not finite.

        Args:
            wait: look at the loss itself, though the GPU may not have come to it yet.

        Raises:
            MemtxError: it is not.
        """
        loss = self._loss if wait else self._copy
        if loss is not None and not torch.isfinite(loss).item():
            raise MemtxError(
                f"The loss is {float(loss)} at step {self._step}, expected a finite one.",
                "Training diverged: lower the learning rate, warm up longer or clip the gradient; "
                "the run's last checkpoint is from before.",
            )
