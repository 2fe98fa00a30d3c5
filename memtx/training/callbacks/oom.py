"""Hints for out-of-memory errors: which option halves the memory of a step, with the numbers of the run."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import RunningStage

_OOM_MESSAGES = ("can't allocate memory", "not enough memory", "ALLOC_FAILED", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is about memory: torch's on GPU or CPU, or Python's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OOM_MESSAGES)


class OutOfMemoryHint(pl.Callback):
    """Adds a hint to out-of-memory errors, which the command line prints and Python shows below the traceback."""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Add the hint as a note."""
        if is_out_of_memory(exception):
            exception.add_note(format_hint(trainer, pl_module))


def format_hint(trainer: pl.Trainer, module: pl.LightningModule) -> str:
    """Return sentences that name options to change, for a trainer as it stopped."""
    data: Any = getattr(trainer, "datamodule", None)
    memory = "GPU memory" if module.device.type == "cuda" else "memory"
    if trainer.state.stage in (RunningStage.TRAINING, None):
        return f"Out of {memory} in training. {_describe_usage(module)}{_suggest_options(trainer, module, data)}"
    batch_size = int(getattr(data, "eval_batch_size", None) or getattr(data, "batch_size", None) or 1)
    if batch_size == 1:
        return f"Out of {memory} in evaluation with batch size 1: use a smaller model or shorter segments."
    option = "eval_batch_size" if hasattr(data, "eval_batch_size") else "batch_size"
    return (
        f"Out of {memory} in evaluation with batch size {batch_size}: --data.{option} {batch_size // 2} halves the "
        "activations and changes no result."
    )


def _describe_usage(module: pl.LightningModule) -> str:
    num_bytes = {True: 0, False: 0}
    for parameter in module.parameters():
        num_bytes[parameter.requires_grad] += parameter.numel() * parameter.element_size()
    # The weights, and for trained ones a gradient and two moments of Adam.
    size = _format_bytes(num_bytes[False] + 4 * num_bytes[True])
    return f"Weights, gradients and optimizer take about {size}, the rest is activations. "


def _suggest_options(trainer: pl.Trainer, module: Any, data: Any) -> str:
    names = ("batch_size", "segment_length", "bptt_segments")
    batch_size, segment_length, bptt_segments = (getattr(data, name, None) or 1 for name in names)
    depth = len(getattr(module.model, "blocks", ()) or ())
    hints = []
    # A resumed run must keep its batch size: it is the number of its streams.
    if batch_size > 1 and trainer.ckpt_path is None:
        hints.append(
            f"--data.batch_size {batch_size // 2} halves them, and with --trainer.accumulate_grad_batches "
            f"{trainer.accumulate_grad_batches * 2} the tokens per step stay the same"
        )
    elif bptt_segments > 1:
        hints.append(f"--data.bptt_segments {bptt_segments // 2} halves them")
    elif segment_length > 1:
        hints.append(f"--data.segment_length {segment_length // 2} halves them")
    if bptt_segments > 1 and getattr(module, "replay", True) is False:
        hints.append(f"--model.replay true stores one segment's instead of {bptt_segments}, for a third more time")
    if depth > 1 and getattr(module.model, "activation_checkpointing", True) is False:
        hints.append(
            f"--model.activation_checkpointing true stores one layer's instead of {depth}, for a third more time"
        )
    segments = f"{bptt_segments} segment{'s' * (bptt_segments != 1)}"
    shape = f"batch size {batch_size} x {segments} x {segment_length} tokens"
    return f"They are those of {shape}: {'; '.join(hints) or 'use a smaller model'}."


def _format_bytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
