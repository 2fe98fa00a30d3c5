"""A memory that is full, of the GPU or the machine: which setting halves what a step holds, with the run's numbers."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import RunningStage

_OOM_MESSAGES = ("can't allocate memory", "not enough memory", "ALLOC_FAILED", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory could not be had: torch's on GPU or CPU, or Python's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _OOM_MESSAGES)


class OutOfMemoryHint(pl.Callback):
    """Adds to an error about memory what to change; the command line says it in one line, Python below the error."""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Add the note."""
        if is_out_of_memory(exception):
            exception.add_note(format_hint(trainer, pl_module))


def format_hint(trainer: pl.Trainer, module: pl.LightningModule) -> str:
    """Return what to change, in sentences.

    Args:
        trainer: of the run, as it stopped.
        module: the module that was trained or measured.
    """
    data: Any = getattr(trainer, "datamodule", None)
    where = "GPU's memory" if module.device.type == "cuda" else "machine's memory"
    if trainer.state.stage not in (RunningStage.TRAINING, None):
        rows = int(getattr(data, "eval_batch_size", None) or getattr(data, "batch_size", None) or 1)
        if rows > 1:
            setting = "eval_batch_size" if hasattr(data, "eval_batch_size") else "batch_size"
            return (
                f"The {where} is full while {rows} rows are measured at once: --data.{setting} {rows // 2} halves what "
                "they hold, and changes no figure."
            )
        return f"The {where} is full while one row is measured: give a smaller model or a shorter segment."
    return f"The {where} is full in training. {_describe_usage(module)}{_suggest_options(trainer, module, data)}"


def _describe_usage(module: pl.LightningModule) -> str:
    parameters = [one for one in module.parameters() if one.requires_grad]
    weights = sum(one.numel() * one.element_size() for one in module.parameters())
    # A gradient for each that learns, and the two means of Adam and its kin.
    learning = 3 * sum(one.numel() * one.element_size() for one in parameters)
    return (
        f"Weights, gradients and optimiser take about {_format_bytes(weights + learning)}, "
        "the rest is a step's activations. "
    )


def _suggest_options(trainer: pl.Trainer, module: Any, data: Any) -> str:
    rows, segment, horizon = (
        getattr(data, name, None) or 1 for name in ("batch_size", "segment_length", "bptt_segments")
    )
    depth = len(getattr(module.model, "blocks", ()) or ())
    held = f"{rows} rows x {horizon} {'segment' if horizon == 1 else 'segments'} x {segment} tokens"
    cures = []
    # A run that goes on has to keep its rows: they are streams.
    if rows > 1 and trainer.ckpt_path is None:
        steps = trainer.accumulate_grad_batches * 2
        cures.append(
            f"--data.batch_size {rows // 2} halves these, and with --trainer.accumulate_grad_batches {steps} "
            "a step learns from as many tokens"
        )
    elif horizon > 1:
        cures.append(f"--data.bptt_segments {horizon // 2} halves these")
    elif segment > 1:
        cures.append(f"--data.segment_length {segment // 2} halves these")
    if horizon > 1 and getattr(module, "replay", True) is False:
        cures.append(f"--model.replay true keeps one segment's instead of {horizon}, for a third more time")
    if depth > 1 and getattr(module.model, "activation_checkpointing", True) is False:
        cures.append(
            f"--model.activation_checkpointing true keeps one layer's instead of {depth}, for a third more time"
        )
    return f"They are of {held}: {'; '.join(cures) or 'use a smaller model'}."


def _format_bytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
