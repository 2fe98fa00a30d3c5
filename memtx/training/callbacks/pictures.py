"""Pictures of validations for trackers: loss by position, gain from memory, confusion of labels, norms of the state."""

from __future__ import annotations

import io
import math
import re
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from memtx.checkpoint import trainer_state
from memtx.errors import check_at_least
from memtx.training import trackers
from memtx.training.base_module import BaseModule
from memtx.training.metrics import position_of_bins

_GAIN = re.compile(r"val_memory_gain_(\d+)")
_RMS = re.compile(r"memory_rms_(\d+)")


class ValidationPictures(pl.Callback):
    """Draws pictures of validations and logs them with every logger that takes pictures.

    ``bits_per_byte_by_position`` and ``memory_gain_by_distance`` are curves over the tokens read before, ``confusion``
    counts predicted labels by true label, and ``memory_rms`` is the size of each layer's state at the validations so
    far. A run logs those that it has figures for.

    Args:
        every_n_steps: Optimizer steps between two drawings, at least.

    Raises:
        MemtxError: ``every_n_steps`` is below 1.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        check_at_least(1, every_n_steps=every_n_steps)
        self.every_n_steps = every_n_steps
        self._last_step = 0
        self._rms_history: dict[str, tuple[list[float], list[float]]] = {}
        self._failed: set[str] = set()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to collect sums if pictures are due."""
        is_due = trainer.global_step - self._last_step >= self.every_n_steps
        is_training = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if isinstance(pl_module, BaseModule) and is_due and is_training:
            pl_module.picture_sums = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw and log."""
        if not isinstance(pl_module, BaseModule) or pl_module.picture_sums is None:
            return
        sums, pl_module.picture_sums = _sum_over_ranks(pl_module.picture_sums), None
        self._last_step = trainer.global_step
        if trainer.is_global_zero:
            for name, png in self._draw(trainer, sums).items():
                self._log(trainer, name, png)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Collect no more."""
        if isinstance(pl_module, BaseModule):
            pl_module.picture_sums = None

    def _draw(self, trainer: pl.Trainer, sums: dict[str, Tensor]) -> dict[str, bytes]:
        from memtx import plots, task_plots

        pictures: dict[str, bytes] = {}
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        title, x_label = f"step {trainer.global_step:,}", "tokens of the document read before"
        if "position" in sums and (curve := _position_curve(sums["position"])):
            pictures["bits_per_byte_by_position"] = _render(
                plots.plot_by_distance, {"": curve}, title=f"Bits per byte by position, {title}", x_label=x_label,
                y_label="bits per byte",
            )  # fmt: skip
        gains = sorted((int(match[1]), metrics[name]) for name in metrics if (match := _GAIN.fullmatch(name)))
        if gains:
            pictures["memory_gain_by_distance"] = _render(
                plots.plot_by_distance, {"": tuple(zip(*gains, strict=True))}, x_label=x_label,
                title=f"Gain from memory, {title}", y_label="bits per byte",
            )  # fmt: skip
        if "confusion" in sums:
            labels = getattr(getattr(trainer, "datamodule", None), "task", None)
            names = list(getattr(labels, "labels", ())) or [str(index) for index in range(len(sums["confusion"]))]
            pictures["confusion"] = _render(
                task_plots.plot_confusion, names, sums["confusion"].tolist(), title=f"Labels, {title}"
            )
        for name, value in metrics.items():
            if match := _RMS.fullmatch(name):
                steps, values = self._rms_history.setdefault(f"layer {match[1]}", ([], []))
                steps.append(trainer.global_step)
                values.append(value)
        if self._rms_history:
            pictures["memory_rms"] = _render(
                plots.plot_loss_curves, self._rms_history, title="Root mean square of the state", y_label="RMS"
            )
        return pictures

    def _log(self, trainer: pl.Trainer, name: str, png: bytes) -> None:
        for logger in trainer.loggers:
            kind = type(logger).__name__
            try:
                trackers.log_picture(logger, name, png, trainer.global_step)
            except Exception as error:  # of any package: a picture must not end the run
                if kind not in self._failed:
                    trainer_state.write_status(trainer, f"{kind} did not take the picture '{name}': {error}")
                self._failed.add(kind)


def _render(plot: Any, *values: Any, **options: Any) -> bytes:
    content = io.BytesIO()
    plot(content, *values, **options)
    return content.getvalue()


def _position_curve(sums: Tensor) -> tuple[list[float], list[float]] | None:
    """Return positions and bits per byte of the bins that hold text."""
    nats, num_bytes = sums
    filled = num_bytes > 0
    if not filled.any():
        return None
    bits = nats[filled] / num_bytes[filled] / math.log(2)
    return position_of_bins(len(filled))[filled].tolist(), bits.tolist()


def _sum_over_ranks(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the sums of all processes, of which some may have read nothing."""
    local = {name: value.cpu() for name, value in sums.items()}
    gathered: list[Any] = [local]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gathered = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, local)
    totals: dict[str, Tensor] = {}
    for name, value in (item for rank_sums in gathered for item in rank_sums.items()):
        totals[name] = totals[name] + value if name in totals else value
    return totals
