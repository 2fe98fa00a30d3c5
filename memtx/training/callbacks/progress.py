"""Progress of a run: a bar in a terminal, else a line every half minute."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from memtx.checkpoint import trainer_state

_TRAIN_METRICS = (("train_loss", "loss", ".3f"), ("train_bits_per_byte", "bits/byte", ".3f"))
_VAL_METRICS = (
    ("val_loss", "loss", ".3f"),
    ("val_bits_per_byte", "bits/byte", ".4f"),
    ("val_bits_per_character", "bits/character", ".4f"),
    ("val_word_perplexity", "word perplexity", ".5g"),
    ("val_accuracy", "accuracy", ".4f"),
    ("val_exact_match", "exact match", ".4f"),
    ("val_f1", "F1", ".4f"),
    ("val_rouge1", "ROUGE-1", ".4f"),
    ("val_rouge2", "ROUGE-2", ".4f"),
    ("val_rougeL", "ROUGE-L", ".4f"),
    ("val_memory_gain", "memory gain", ".4f"),
)
_SHORT_NAMES = {
    "train_loss": "loss",
    "train_bits_per_byte": "bits/byte",
    "val_bits_per_byte": "val bits/byte",
    "tokens_per_second": "tokens/s",
}


def _format_metrics(metrics: Mapping[str, Any], names: tuple[tuple[str, str, str], ...]) -> str:
    return "".join(f"  {label} {float(metrics[name]):{spec}}" for name, label, spec in names if name in metrics)


def format_duration(seconds: float) -> str:
    """Return a duration such as ``45 s``, ``12 min`` or ``3 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class PlainProgress(pl.Callback):
    """Writes a line to stderr at intervals and at each validation, for logs and pipes.

    Args:
        interval_seconds: Seconds between two lines, at least.
        write: Takes a line with its end. Defaults to ``sys.stderr.write``.
        clock: Returns monotonic seconds.
    """

    def __init__(
        self,
        interval_seconds: float = 30.0,
        write: Callable[[str], Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._interval_seconds, self._write, self._clock = interval_seconds, write, clock
        self._start_time = self._last_time = 0.0
        self._first_step = self._num_tokens = 0

    def _write_line(self, trainer: pl.Trainer, text: str) -> None:
        if trainer.is_global_zero:
            # Looked up on each call, as sys.stderr may have been replaced.
            write = self._write if self._write is not None else sys.stderr.write
            total = trainer_state.total_steps(trainer)
            write(f"step {trainer.global_step}{'' if total is None else f'/{total}'}{text}\n")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._start_time = self._last_time = self._clock()
        self._first_step, self._num_tokens = trainer.global_step, 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the tokens, and write a line if the interval is over."""
        self._num_tokens += batch.tokens.numel() * trainer.world_size
        now = self._clock()
        if now - self._last_time < self._interval_seconds or not trainer_state.has_stepped(trainer):
            return
        rate = f"  {self._num_tokens / max(now - self._last_time, 1e-9):.0f} tokens/s"
        remaining, total = "", trainer_state.total_steps(trainer)
        if total is not None and (num_steps := trainer.global_step - self._first_step):
            # All the time since the start counts, because validations and checkpoints will recur.
            seconds = (now - self._start_time) / num_steps * (total - trainer.global_step)
            remaining = f"  {format_duration(seconds)} left"
        self._write_line(trainer, _format_metrics(trainer.callback_metrics, _TRAIN_METRICS) + rate + remaining)
        self._last_time, self._num_tokens = now, 0

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the metrics of validation, whose time does not count as training."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self._write_line(trainer, "  validation" + _format_metrics(trainer.callback_metrics, _VAL_METRICS))
        self._last_time, self._num_tokens = self._clock(), 0


def count_steps_only(bar: Any, options: Mapping[str, Any]) -> None:
    """Keep Lightning's rich bar from describing a run without a number of epochs as "Epoch 0/-2"."""
    if type(bar) is RichProgressBar and options.get("max_epochs") in (None, -1) and options.get("max_steps") != -1:
        bar._get_train_description = partial("Epoch {}".format)  # type: ignore[method-assign]


class StepProgressBar(RichProgressBar):
    """One bar for the whole run in optimizer steps; Lightning's counts the batches of an epoch."""

    def _get_train_description(self, current_epoch: int) -> str:
        return f"{'Step':{len(self.validation_description)}}"

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the bar in the first epoch."""
        self._ensure_bar(trainer)

    def _ensure_bar(self, trainer: pl.Trainer) -> None:
        if self.is_disabled or self.progress is None or self.train_progress_bar_id is not None:
            return
        total = trainer_state.total_steps(trainer)
        # A resumed run starts at its step, so that the bar's speed is right.
        self.train_progress_bar_id = self.progress.add_task(
            self._get_train_description(trainer.current_epoch),
            total=math.inf if total is None else total,
            completed=trainer.global_step,
        )
        self.refresh()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the bar."""
        self._ensure_bar(trainer)  # A resumed run may start in the middle of an epoch.
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return the metrics beside the bar."""
        metrics = super().get_metrics(trainer, pl_module)
        # Left out, because the line must hold the others.
        for name in ("v_num", "val_word_perplexity"):
            metrics.pop(name, None)
        if isinstance(rate := metrics.get("tokens_per_second"), float):
            metrics["tokens_per_second"] = f"{rate:.0f}"
        return {_SHORT_NAMES.get(name, name): value for name, value in metrics.items()}
