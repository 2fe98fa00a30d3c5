"""Parameters frozen for some epochs, such as a pretrained backbone while a new head adapts."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import lightning.pytorch as pl
from torch import nn

from memtx.errors import MemtxError, closest_match


class Freeze(pl.Callback):
    """Freezes parameters until an epoch begins; use several for parts that are unfrozen one after another.

    The optimizer has frozen parameters from the start and skips them, weight decay included, while they have no
    gradient. (Lightning's BaseFinetuning adds them as parameter groups later, which the schedule does not know.)

    Args:
        parameters: Patterns of parameter names, such as ``backbone.*`` or ``backbone.blocks.[0-5].*``.
        epochs: Epochs to freeze them for. None means all.

    Raises:
        MemtxError: There is no pattern, or ``epochs`` is not positive.
    """

    def __init__(self, parameters: Sequence[str] = ("backbone.*",), epochs: int | None = None) -> None:
        if not parameters or (epochs is not None and epochs < 1):
            raise MemtxError(
                f"Freeze has {len(parameters)} patterns and {epochs} epochs.", "Give at least one of each, or null."
            )
        self.parameters, self.epochs = tuple(parameters), epochs

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Freeze the parameters, which the optimizer has by now; raises MemtxError if a pattern matches none."""
        names = [name for name, _ in _model(pl_module).named_parameters()]
        for pattern in self.parameters:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise MemtxError(
                    f"No parameter matches '{pattern}'.{closest_match(pattern, names)}",
                    f"Use names such as '{names[0]}'; * matches anything.",
                )
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Freeze the parameters, or unfreeze them once their epoch has begun."""
        is_trained = self.epochs is not None and trainer.current_epoch >= self.epochs
        for parameter in self._matching_parameters(pl_module):
            if parameter.requires_grad and not is_trained:
                parameter.grad = None
            parameter.requires_grad_(is_trained)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Unfreeze all parameters."""
        for parameter in self._matching_parameters(pl_module):
            parameter.requires_grad_(True)

    def _matching_parameters(self, pl_module: pl.LightningModule) -> list[nn.Parameter]:
        named = _model(pl_module).named_parameters()
        return [weight for name, weight in named if any(fnmatchcase(name, pattern) for pattern in self.parameters)]


def _model(pl_module: pl.LightningModule) -> nn.Module:
    model = getattr(pl_module, "model", pl_module)
    assert isinstance(model, nn.Module)
    return model
