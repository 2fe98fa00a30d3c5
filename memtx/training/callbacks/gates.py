"""How often the memories' gates are exactly zero, so that what they hold stays as it is to the bit."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from memtx.memory.gates import Gate


class ClosedGates(pl.Callback):
    """Logs ``val_gates_closed``: of all gates of all layers in a validation, the share that was exactly zero.

    A run whose gates never close forgets on streams much longer than those it was trained on, whatever its loss says.
    A model without gates logs nothing.
    """

    def __init__(self) -> None:
        self._watched: list[RemovableHandle] = []
        self._counts: Tensor | None = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to watch."""
        self._counts = torch.zeros(2, dtype=torch.float64, device=pl_module.device)
        gates = [module for module in pl_module.modules() if isinstance(module, Gate)]
        self._watched = [gate.register_forward_hook(self._watch) for gate in gates]

    def _watch(self, gate: nn.Module, given: Any, out: Tensor) -> None:
        assert self._counts is not None
        self._counts += torch.stack([(out == 0).sum(), torch.tensor(out.numel(), device=out.device)])

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the share of all ranks."""
        if self._watched and self._counts is not None:
            every = pl_module.all_gather(self._counts)
            assert isinstance(every, Tensor)
            closed, seen = every.view(-1, 2).sum(0)
            pl_module.log("val_gates_closed", (closed / seen.clamp(min=1)).float(), rank_zero_only=True)
        self._forget()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop watching."""
        self._forget()

    def _forget(self) -> None:
        for handle in self._watched:
            handle.remove()
        self._watched = []
