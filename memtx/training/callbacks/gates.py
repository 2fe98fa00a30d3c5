"""How often the memories' gates are exactly zero, so that what they hold stays as it is to the bit."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from memtx.memory.parts import Gate


class ClosedGateMonitor(pl.Callback):
    """Logs ``val_closed_gate_fraction``: of all gates of all layers in a validation, the share that was exactly zero.

    A run whose gates never close forgets on streams much longer than those it was trained on, whatever its loss says.
    A model without gates logs nothing.
    """

    def __init__(self) -> None:
        self._hook_handles: list[RemovableHandle] = []
        self._gate_counts: Tensor | None = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to watch."""
        self._gate_counts = torch.zeros(2, dtype=torch.float64, device=pl_module.device)
        gates = [module for module in pl_module.modules() if isinstance(module, Gate)]
        self._hook_handles = [gate.register_forward_hook(self._count_closed) for gate in gates]

    def _count_closed(self, gate: nn.Module, inputs: Any, output: Tensor) -> None:
        assert self._gate_counts is not None
        self._gate_counts += torch.stack([(output == 0).sum(), torch.tensor(output.numel(), device=output.device)])

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the share of all ranks."""
        if self._hook_handles and self._gate_counts is not None:
            every = pl_module.all_gather(self._gate_counts)
            assert isinstance(every, Tensor)
            closed, seen = every.view(-1, 2).sum(0)
            pl_module.log("val_closed_gate_fraction", (closed / seen.clamp(min=1)).float(), rank_zero_only=True)
        self._remove_hooks()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop watching."""
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for handle in self._hook_handles:
            handle.remove()
        self._hook_handles = []
