"""How fast a run goes, how much of the machine it uses, and what it holds."""

from __future__ import annotations

import logging
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from memtx.errors import check_at_least, check_positive
from memtx.training import cost
from memtx.training.carry import get_carry
from memtx.training.language import LanguageModule

MATRIX_SIZES = {"cuda": 4096}
"""Of the matrices that a device's peak is measured with; it takes a tenth of a second."""
DEFAULT_MATRIX_SIZE = 1024

logger = logging.getLogger(__name__)


def peak_memory_bytes(device: torch.device | None = None) -> int:
    """Return the most memory held so far: of the GPU where ``device`` is one, else of the process."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def current_memory_bytes(device: torch.device) -> int | None:
    """Return the memory held now, by the same count; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def matmul_dtype(precision: str) -> torch.dtype:
    """Return the type that a precision of Lightning's multiplies matrices in."""
    if "bf16" in precision:
        return torch.bfloat16
    if "16" in precision:
        return torch.float16
    return torch.float64 if "64" in precision else torch.float32


class Throughput(pl.Callback):
    """Logs how training goes, validation's time left out.

    ``tokens_per_second`` (all ranks), ``memory_mib`` and ``peak_memory_mib`` (of this rank's GPU, else of its process),
    ``state_mib``, and for language models ``model_tflops`` and ``mfu``: the operations a second
    that the model asks for (see :mod:`memtx.training.cost`), and their share of what the devices can do.

    Args:
        every_n_batches: training batches between two figures.
        peak_tflops: of one device, in the run's precision; None to measure it by a product of matrices once.

    Raises:
        MemtxError: a number is not positive.
    """

    def __init__(self, every_n_batches: int = 10, peak_tflops: float | None = None) -> None:
        check_at_least(1, every_n_batches=every_n_batches)
        if peak_tflops is not None:
            check_positive(peak_tflops=peak_tflops)
        self.every_n_batches, self.peak_tflops = every_n_batches, peak_tflops
        self._start_time = 0.0
        self._num_tokens = 0
        self._flops_per_token: float | None = None
        self._flops_counted = False

    def _reset_window(self) -> None:
        self._start_time, self._num_tokens = time.perf_counter(), 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count."""
        self._reset_window()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the validation's time out."""
        self._reset_window()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count, and log from time to time."""
        self._num_tokens += batch.tokens.numel() * trainer.world_size
        if (batch_idx + 1) % self.every_n_batches:
            return
        rate = self._num_tokens / max(time.perf_counter() - self._start_time, 1e-9)
        device = pl_module.device
        figures = {"peak_memory_mib": peak_memory_bytes(device) / 2**20}
        if (held := current_memory_bytes(device)) is not None:
            figures["memory_mib"] = held / 2**20
        if (carry := get_carry(pl_module)) is not None:
            figures["state_mib"] = carry.nbytes("train") / 2**20
        if (flops := self._get_flops_per_token(trainer, pl_module, batch)) is not None and self.peak_tflops is not None:
            figures["model_tflops"] = rate * flops / 1e12
            figures["mfu"] = rate * flops / (1e12 * self.peak_tflops * trainer.world_size)
        pl_module.log_dict({"tokens_per_second": rate}, prog_bar=True)
        pl_module.log_dict(figures)
        self._reset_window()

    def _get_flops_per_token(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> float | None:
        """Return the model operations of a token's training, counted when first asked for; None where unknown."""
        if not self._flops_counted:
            self._flops_counted = True
            if isinstance(module, LanguageModule):
                try:
                    found = cost.count_flops(module.model, module.segment_length)
                except Exception as error:  # a part from elsewhere; a run does not end for a figure
                    logger.info("The model's operations could not be counted: %s", error)
                else:
                    self._flops_per_token = found.training if found.includes_attention else None
            if self._flops_per_token is not None and self.peak_tflops is None:
                device = module.device
                size = MATRIX_SIZES.get(device.type, DEFAULT_MATRIX_SIZE)
                self.peak_tflops = cost.measure_peak_flops(device, matmul_dtype(str(trainer.precision)), size) / 1e12
        return self._flops_per_token
