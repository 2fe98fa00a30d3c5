"""A callback for runs in separate processes: records losses, gradients and weights, and sends signals."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.distributed.tensor import DTensor

from memtx import files


def full(tensor: Any) -> Any:
    """Put a tensor together that is shared out over processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Watch(pl.Callback):
    """Appends every batch's loss to <to>/losses-<rank>, to the last bit.

    Args:
        to: folder.
        strike: Batch in which a signal is sent.
        moment: Before "forward", "step" (the optimizer's), or "score" (a validation batch after the one to strike in).
        signal: Signal number.
        rank: Rank of the process to signal.
        gradients: If True, save the gradients of the first step.
        spoil: Batch in which the loss of that process, but not its gradient, is made NaN.
    """

    def __init__(
        self,
        to: str,
        strike: int = -1,
        moment: str = "forward",
        signal: int = 9,
        rank: int = 0,
        gradients: bool = False,
        spoil: int = -1,
    ) -> None:
        self.to, self.strike, self.moment, self.signal = Path(to), strike, moment, signal
        self.rank, self.gradients, self.spoil = rank, gradients, spoil

    def _at(self, trainer: pl.Trainer, moment: str, batch: int) -> None:
        if moment == self.moment and batch == self.strike and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.signal)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._at(trainer, "forward", trainer.fit_loop.epoch_loop.total_batch_idx)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.spoil and trainer.global_rank == self.rank:
            loss.detach().fill_(torch.nan)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._at(trainer, "step", trainer.fit_loop.epoch_loop.total_batch_idx)
        if self.gradients and trainer.global_step == 0:
            gradients = {name: full(weight.grad) for name, weight in pl_module.named_parameters()}
            if trainer.is_global_zero:
                files.save_tensors(self.to / "gradients", gradients, kind="gradients", version=1)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not trainer.sanity_checking and batch_idx == 1:
            self._at(trainer, "score", trainer.fit_loop.epoch_loop.total_batch_idx)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.to.mkdir(exist_ok=True)
        with (self.to / f"losses-{trainer.global_rank}").open("a") as file:
            file.write(f"{trainer.fit_loop.epoch_loop.total_batch_idx} {float(outputs['loss']).hex()}\n")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        tensors = {name: full(tensor.detach()).cpu().numpy() for name, tensor in pl_module.state_dict().items()}
        digests = {name: hashlib.sha256(tensor.tobytes()).hexdigest() for name, tensor in tensors.items()}
        (self.to / f"weights-{trainer.global_rank}").write_text(json.dumps(digests))
