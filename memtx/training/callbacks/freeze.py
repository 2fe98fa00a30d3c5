"""Parts of a model that keep their weights for some epochs: a pretrained body while a new head finds its place."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import lightning.pytorch as pl
from torch import nn

from memtx.errors import MemtxError, closest_match


class Freeze(pl.Callback):
    """Keeps parameters as they are until an epoch begins.

    Set as one of ``trainer.callbacks``, several times for parts that thaw one after another. The optimiser knows frozen
    parameters from the start and leaves them alone, decay included, while they have no gradient.

    Args:
        parameters: patterns of names in the model, such as ``backbone.*`` or ``backbone.blocks.[0-5].*``.
        epochs: how many they are frozen for; null for all.

    Raises:
        MemtxError: there is no pattern, or epochs is not positive.
    """

    def __init__(self, parameters: Sequence[str] = ("backbone.*",), epochs: int | None = None) -> None:
        if not parameters or (epochs is not None and epochs < 1):
            raise MemtxError(
                f"Freeze got {len(parameters)} patterns and {epochs} epochs.", "Give at least one of each, or null."
            )
        self.parameters, self.epochs = tuple(parameters), epochs

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Freeze; here, since the optimiser takes only what learns when it is made.

        Raises:
            MemtxError: a pattern fits no parameter.
        """
        named = dict(self._get_model(pl_module).named_parameters())
        for pattern in self.parameters:
            if not any(fnmatchcase(name, pattern) for name in named):
                raise MemtxError(
                    f"No parameter is named '{pattern}'.{closest_match(pattern, named)}",
                    f"Names are such as '{next(iter(named))}'; * stands for anything.",
                )
        self._update_requires_grad(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Thaw when it is time."""
        self._update_requires_grad(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the model as it was."""
        for parameter in self._matching_parameters(pl_module):
            parameter.requires_grad_(True)

    def _update_requires_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        learns = self.epochs is not None and trainer.current_epoch >= self.epochs
        for parameter in self._matching_parameters(pl_module):
            if parameter.requires_grad and not learns:
                parameter.grad = None
            parameter.requires_grad_(learns)

    @staticmethod
    def _get_model(pl_module: pl.LightningModule) -> nn.Module:
        model = getattr(pl_module, "model", pl_module)
        assert isinstance(model, nn.Module)
        return model

    def _matching_parameters(self, pl_module: pl.LightningModule) -> list[nn.Parameter]:
        named = self._get_model(pl_module).named_parameters()
        return [one for name, one in named if any(fnmatchcase(name, pattern) for pattern in self.parameters)]
