"""Lightning's StochasticWeightAveraging with the average in checkpoints, as its WeightAveraging does."""

from __future__ import annotations

from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

_TRAINED_WEIGHTS_KEY = "memtx_trained_weights"  # in a checkpoint whose ``state_dict`` is the average


def _find_average(trainer: pl.Trainer) -> nn.Module | None:
    for callback in cast(Any, trainer).callbacks:
        if isinstance(callback, StochasticWeightAveraging) and callback.n_averaged is not None:
            return callback._average_model if callback.n_averaged > 0 else None
    return None


@torch.no_grad()
def swap_average(trainer: pl.Trainer, module: nn.Module) -> None:
    """Exchange the trained weights and their average, if there is one: before a validation and after it."""
    if (average := _find_average(trainer)) is None or trainer.state.fn != TrainerFn.FITTING:
        return
    for weight, mean in zip(module.parameters(), average.parameters(), strict=True):
        weight.data, mean.data = mean.data.to(weight.device), weight.data.to(mean.device)


def save_average(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Make the average the checkpoint's weights, if there is one, and keep the trained ones beside it."""
    if (average := _find_average(trainer)) is not None:
        checkpoint[_TRAINED_WEIGHTS_KEY] = checkpoint["state_dict"]
        checkpoint["state_dict"] = average.state_dict()


def load_trained_weights(trainer: pl.Trainer | None, checkpoint: dict[str, Any]) -> None:
    """Make a checkpoint's trained weights those that a resumed run continues from."""
    if trainer is not None and trainer.state.fn == TrainerFn.FITTING and _TRAINED_WEIGHTS_KEY in checkpoint:
        checkpoint["state_dict"] = checkpoint[_TRAINED_WEIGHTS_KEY]
