"""Speed, hardware utilization and memory of a training run."""

from __future__ import annotations

import logging
import time
from typing import Any

import lightning.pytorch as pl
import torch

from memtx.errors import check_at_least, check_positive
from memtx.ops.cpu.malloc import current_memory_bytes, peak_memory_bytes
from memtx.training import cost
from memtx.training.carry import get_carry
from memtx.training.language import LanguageModule

MATRIX_SIZES = {"cuda": 4096}
"""Size of the matrices that measure a device's peak, by device type; the measurement takes a tenth of a second."""
DEFAULT_MATRIX_SIZE = 1024

logger = logging.getLogger(__name__)


def matmul_dtype(precision: str) -> torch.dtype:
    """Return the dtype of matrix products under one of Lightning's precisions."""
    if "bf16" in precision:
        return torch.bfloat16
    if "16" in precision:
        return torch.float16
    return torch.float64 if "64" in precision else torch.float32


class Throughput(pl.Callback):
    """Logs speed and memory of training, without the time of validation.

    Logs ``tokens_per_second`` (all ranks), ``memory_mib`` and ``peak_memory_mib`` (this rank's GPU, else its process),
    ``state_mib``, and for language models ``model_tflops`` and ``mfu``: the model operations per second (see
    :mod:`memtx.training.cost`) and their fraction of the devices' peak.

    Args:
        every_n_batches: Training batches between two logs. Defaults to 10.
        peak_tflops: Peak of one device in the run's precision. None measures it once with a matrix product.

    Raises:
        MemtxError: A number is not positive.
    """

    def __init__(self, every_n_batches: int = 10, peak_tflops: float | None = None) -> None:
        check_at_least(1, every_n_batches=every_n_batches)
        if peak_tflops is not None:
            check_positive(peak_tflops=peak_tflops)
        self.every_n_batches, self.peak_tflops = every_n_batches, peak_tflops
        self._start_time, self._num_tokens = 0.0, 0
        self._flops_per_token: float | None = None
        self._counted_length: int | None = 0  # segment length at the last count

    def _reset_window(self) -> None:
        self._start_time, self._num_tokens = time.perf_counter(), 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock, also after validation."""
        self._reset_window()

    on_validation_end = on_train_start

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the tokens, and log every ``every_n_batches`` batches."""
        self._num_tokens += batch.tokens.numel() * trainer.world_size
        if (batch_idx + 1) % self.every_n_batches:
            return
        rate = self._num_tokens / max(time.perf_counter() - self._start_time, 1e-9)
        device = pl_module.device
        metrics = {"peak_memory_mib": peak_memory_bytes(device) / 2**20}
        if (memory := current_memory_bytes(device)) is not None:
            metrics["memory_mib"] = memory / 2**20
        if (carry := get_carry(pl_module)) is not None:
            metrics["state_mib"] = carry.nbytes("train") / 2**20
        if (flops := self._get_flops_per_token(trainer, pl_module)) is not None and self.peak_tflops is not None:
            metrics["model_tflops"] = rate * flops / 1e12
            metrics["mfu"] = rate * flops / (1e12 * self.peak_tflops * trainer.world_size)
        pl_module.log_dict({"tokens_per_second": rate}, prog_bar=True)
        pl_module.log_dict(metrics)
        self._reset_window()

    def _get_flops_per_token(self, trainer: pl.Trainer, module: pl.LightningModule) -> float | None:
        """Return the training operations per token, counted for each segment length; None if unknown."""
        length = getattr(module, "segment_length", None)
        if self._counted_length == length:
            return self._flops_per_token
        self._counted_length = length
        if isinstance(module, LanguageModule):
            try:
                flops = cost.count_flops(module.model, module.segment_length)
            except Exception as error:  # A third party's module must not end the run.
                logger.info("The model's operations could not be counted: %s", error)
            else:
                self._flops_per_token = flops.training if flops.includes_attention else None
        if self._flops_per_token is not None and self.peak_tflops is None:
            size = MATRIX_SIZES.get(module.device.type, DEFAULT_MATRIX_SIZE)
            dtype = matmul_dtype(str(trainer.precision))
            self.peak_tflops = cost.measure_peak_flops(module.device, dtype, size) / 1e12
        return self._flops_per_token
