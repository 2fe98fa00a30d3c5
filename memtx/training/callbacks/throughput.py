"""How fast a run goes and what it holds: tokens a second, state and peak memory."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch


def peak_memory_bytes(device: torch.device | None = None) -> int:
    """Return the most memory held so far: of the GPU where ``device`` is one, else of the process."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Throughput(pl.Callback):
    """Logs ``tokens_per_second`` (all ranks, training steps alone), ``state_mib`` and ``peak_memory_mib``.

    Args:
        every: training batches between two figures.
    """

    def __init__(self, every: int = 10) -> None:
        self.every = every
        self._began = 0.0
        self._tokens = 0

    def _restart(self) -> None:
        self._began, self._tokens = time.perf_counter(), 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count."""
        self._restart()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the validation's time out."""
        self._restart()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count, and log from time to time."""
        self._tokens += batch.tokens.numel() * trainer.world_size
        if (batch_idx + 1) % self.every:
            return
        rate = self._tokens / max(time.perf_counter() - self._began, 1e-9)
        figures = {"tokens_per_second": rate, "peak_memory_mib": peak_memory_bytes(pl_module.device) / 2**20}
        carry = getattr(pl_module, "carry", None)
        if carry is not None:
            figures["state_mib"] = carry.nbytes("train") / 2**20
        pl_module.log_dict({"tokens_per_second": figures.pop("tokens_per_second")}, prog_bar=True)
        pl_module.log_dict(figures)
        self._restart()
