"""Default callbacks of a run, which make way for the user's options and callbacks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelSummary, ProgressBar
from lightning.pytorch.utilities.model_summary.model_summary import _format_summary_table

from memtx.training import trackers
from memtx.training.callbacks.interrupt import StopOnInterrupt
from memtx.training.callbacks.memory_monitor import ClosedGateMonitor, MemoryNormMonitor, UnusedMemoryWarning
from memtx.training.callbacks.oom import OutOfMemoryHint
from memtx.training.callbacks.pictures import ValidationPictures
from memtx.training.callbacks.progress import PlainProgress, StepProgressBar, count_steps_only
from memtx.training.callbacks.skip_nonfinite import SkipNonFinite
from memtx.training.callbacks.throughput import Throughput

BAREBONES_OPTIONS = ["enable_checkpointing", "enable_progress_bar", "enable_model_summary", "logger"]
BAREBONES_OPTIONS += ["log_every_n_steps", "num_sanity_val_steps"]


def adapt_options(options: dict[str, Any], best_checkpoint: Sequence[pl.Callback], interactive: bool) -> dict[str, Any]:
    """Return the trainer's options with the default callbacks that the user's choices leave room for.

    A user's callback replaces the default of its class, a user's progress bar ours, and an option that turns a feature
    off also removes our callbacks for it. ``barebones`` removes all of them, and the options that it turns off.
    """
    choice = options["callbacks"] or []
    # A summary of the same depth, without the line on operations, which Lightning cannot count.
    user_callbacks = [
        ParameterSummary(callback._max_depth) if type(callback) is ModelSummary else callback
        for callback in (choice if isinstance(choice, list) else [choice])
    ]
    for callback in user_callbacks:
        if isinstance(callback, EarlyStopping) and callback.monitor.startswith("val_"):
            # Lightning would look for the metric at the end of an epoch, too, which Ctrl-C or max_steps may bring
            # before the first validation.
            callback._check_on_train_epoch_end = bool(callback._check_on_train_epoch_end)
    if options.get("barebones"):
        return {**options, **dict.fromkeys(BAREBONES_OPTIONS), "callbacks": user_callbacks}
    callbacks: list[pl.Callback] = [Throughput(), UnusedMemoryWarning(), ClosedGateMonitor(), StopOnInterrupt()]
    callbacks += [SkipNonFinite(), MemoryNormMonitor(), OutOfMemoryHint()]
    if loggers := options.get("logger"):
        callbacks.append(LearningRateMonitor("step"))
        loggers = loggers if isinstance(loggers, list) else [loggers]
        if any(map(trackers.takes_pictures, loggers)):
            # A tracker that the user chose gets all; drawing would slow down short runs.
            callbacks.append(ValidationPictures(100 if trackers.is_default(loggers) else 1))
    if options.get("enable_checkpointing") is not False:
        callbacks += best_checkpoint
    if options.get("enable_model_summary") is not False and not _has(user_callbacks, ModelSummary):
        callbacks.append(ParameterSummary())
    shows_bar = options.get("enable_progress_bar")
    if _has(user_callbacks, ProgressBar):
        shows_bar = True if shows_bar is None else shows_bar
        for callback in user_callbacks:
            count_steps_only(callback, options)
    elif shows_bar or (shows_bar is None and interactive):
        callbacks.append(StepProgressBar())
        shows_bar = True
    else:
        callbacks.append(PlainProgress())
        shows_bar = False
    callbacks = [callback for callback in callbacks if not _has(user_callbacks, type(callback))]
    return {**options, "enable_progress_bar": shows_bar, "callbacks": [*user_callbacks, *callbacks]}


def _has(callbacks: Sequence[Any], kind: type[pl.Callback]) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)


class ParameterSummary(ModelSummary):
    """Writes the parts of the model with their parameters to stderr, without Lightning's count of 0 operations."""

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]], *totals: Any, total_flops: int = 0, **options: Any
    ) -> None:
        """Write the table, without a column of operations if none are known."""
        columns = [column for column in summary_data if total_flops or column[0] != "FLOPs"]
        format_table: Any = _format_summary_table
        lines: list[str] = format_table(*totals, total_flops, *columns).splitlines()
        lines = [line for line in lines if total_flops or "flops" not in line.lower()]
        sys.stderr.write("\n".join([*lines, ""]))
