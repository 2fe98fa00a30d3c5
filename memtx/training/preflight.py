"""Checks of a trainer's options before the first step, where Lightning fails in the middle of a run or not at all."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, LearningRateFinder, ModelCheckpoint
from torch.optim import Optimizer

from memtx.checkpoint.training import BestCheckpoint
from memtx.errors import MemtxError, closest_match

_LOGGED_BY_CALLBACK: dict[str, tuple[str, ...]] = {
    "Throughput": ("tokens_per_second", "memory_mib", "peak_memory_mib", "state_mib", "model_tflops", "mfu"),
    "SkipNonFinite": ("grad_norm", "skipped_steps"),
    "ClosedGateMonitor": ("val_closed_gate_fraction",),
    "TokenAccuracy": ("val_accuracy",),
}


def check_numbers(trainer: pl.Trainer) -> None:
    """Raise MemtxError for a number that would divide by zero later, or a search that cannot work."""
    if any(isinstance(callback, LearningRateFinder) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        hint = "Remove it, and try a few values of --model.optimizer.init_args.lr."
        raise MemtxError("LearningRateFinder does not know the groups and the schedule of this optimizer.", hint)
    for name in ("accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval"):
        value = getattr(trainer, name, None)
        if value is None:
            continue
        minimum = 0 if isinstance(value, float) else 1
        if value < minimum or value == 0:
            hint = " To train without validation, use --trainer.limit_val_batches 0." if "val" in name else ""
            raise MemtxError(f"trainer.{name} is {value}, expected a number above 0.", f"Change it.{hint}")


def has_validation(trainer: pl.Trainer) -> bool:
    """Return whether the run can validate."""
    has_split = getattr(getattr(trainer, "datamodule", None), "has_split", None)
    return bool(trainer.enable_validation) and (has_split is None or bool(has_split("validation")))


def allow_clipping(trainer: pl.Trainer, optimizer: Optimizer) -> None:
    """Let a fused optimizer clip gradients, as it can unless it unscales them; raise MemtxError if it does.

    Lightning refuses it in every mixed precision, and the attribute by which it tells is read by scalers alone.
    """
    if not trainer.gradient_clip_val or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise MemtxError(
            f"A fused {type(optimizer).__name__} cannot clip gradients in {trainer.precision}.",
            "Set fused to false, use --trainer.precision bf16-mixed, or --trainer.gradient_clip_val 0.",
        )
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]


def check_monitors(trainer: pl.Trainer, module: pl.LightningModule, logged: set[str], schedule: Any = None) -> None:
    """Raise MemtxError if one monitors a name that is never logged; classes of the user may log any name."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    packages = {type(part).__module__.partition(".")[0] for part in (*module.modules(), *callbacks)}
    if not packages <= {"memtx", "lightning", "pytorch_lightning", "torch", "torchmetrics"}:
        return
    names = logged.union(*(_LOGGED_BY_CALLBACK.get(type(callback).__name__, ()) for callback in callbacks))
    validates = has_validation(trainer)
    names = {name for name in names if not name.startswith(("test_",) if validates else ("test_", "val_"))}
    prefixes = ("memory_rms_", "lr-", *(["val_memory_gain"] if validates else []))
    for owner, monitor in _find_monitors([*callbacks, schedule]):
        if monitor == "val_word_perplexity":
            problem = f"{owner} monitors '{monitor}', which is left out where it means nothing, as early in training."
            raise MemtxError(problem, "Monitor val_bits_per_byte, which ranks checkpoints in the same order.")
        is_aux_loss = monitor.startswith("train_") and not difflib.get_close_matches(monitor, names, cutoff=0.85)
        if monitor in names or is_aux_loss or monitor.startswith(prefixes):
            continue
        if validates or not monitor.startswith("val_"):
            problem, hint = "which is never logged", closest_match(monitor, names)
            raise MemtxError(f"{owner} monitors '{monitor}', {problem}.{hint}", f"Logged: {', '.join(sorted(names))}.")
        if owner != BestCheckpoint.__name__:  # which does without
            raise MemtxError(f"{owner} monitors '{monitor}', but this run has no validation.", "Monitor train_loss.")


def _find_monitors(parts: list[Any]) -> Iterator[tuple[str, str]]:
    """Yield class and monitored name of the callbacks and schedules that cannot do without."""
    for part in parts:
        is_strict = part.strict if isinstance(part, EarlyStopping) else isinstance(part, ModelCheckpoint)
        if (is_strict or not isinstance(part, pl.Callback)) and getattr(part, "monitor", None):
            yield type(part).__name__, part.monitor
