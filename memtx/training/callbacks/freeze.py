"""Parameters frozen for some epochs, such as a pretrained backbone while a new head adapts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from memtx.errors import MemtxError, closest_match

_ROWS = re.compile(r"(.+)\[(\d*):(\d*)\]")


class Freeze(pl.Callback):
    """Freezes parameters until an epoch begins; use several for parts that are unfrozen one after another.

    The optimizer has frozen parameters from the start and skips them, weight decay included, while they have no
    gradient. (Lightning's BaseFinetuning adds them as parameter groups later, which the schedule does not know.)

    Args:
        parameters: Patterns of parameter names, such as ``backbone.*`` or ``backbone.blocks.[0-5].*``; a pattern that
            ends in ``[start:stop]`` freezes these rows alone, as of ``embedding.position_embeddings.weight[512:]``.
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
        self._hooks: list[Any] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Freeze the parameters, which the optimizer has by now; raises MemtxError if a pattern matches none."""
        parameters = dict(_model(pl_module).named_parameters())
        names = list(parameters)
        for pattern in self.parameters:
            match = _ROWS.fullmatch(pattern)
            name_pattern = pattern if match is None else match[1]
            matching = [name for name in names if fnmatchcase(name, name_pattern)]
            if not matching:
                raise MemtxError(
                    f"No parameter matches '{pattern}'.{closest_match(name_pattern, names)}",
                    f"Use names such as '{names[0]}'; * matches anything.",
                )
            if match is not None:
                indices = slice(*(int(bound) if bound else None for bound in match.groups()[1:]))
                for name in matching:
                    self._freeze_rows(trainer, parameters[name], indices, pattern)
        self.on_train_epoch_start(trainer, pl_module)

    def _freeze_rows(self, trainer: pl.Trainer, parameter: nn.Parameter, indices: slice, pattern: str) -> None:
        """Keep the values of rows, which the optimizer would change by momentum and decay without a gradient."""
        values = parameter.detach()[indices].clone()
        if not len(values):
            message = f"'{pattern}' has no rows: the parameter has {len(parameter)}."
            raise MemtxError(message, "Give rows that it has.")

        def drop_gradient(gradient: Tensor) -> Tensor:
            if self._is_trained(trainer):
                return gradient
            gradient = gradient.clone()
            gradient[indices] = 0.0
            return gradient

        def restore(*_: Any) -> None:
            if not self._is_trained(trainer):
                with torch.no_grad():
                    parameter[indices] = values

        self._hooks.append(parameter.register_hook(drop_gradient))  # type: ignore[no-untyped-call]
        self._hooks += [optimizer.register_step_post_hook(restore) for optimizer in trainer.optimizers]

    def _is_trained(self, trainer: pl.Trainer) -> bool:
        return self.epochs is not None and trainer.current_epoch >= self.epochs

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Freeze the parameters, or unfreeze them once their epoch has begun."""
        is_trained = self._is_trained(trainer)
        for parameter in self._matching_parameters(pl_module):
            if parameter.requires_grad and not is_trained:
                parameter.grad = None
            parameter.requires_grad_(is_trained)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Unfreeze all parameters."""
        for parameter in self._matching_parameters(pl_module):
            parameter.requires_grad_(True)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _matching_parameters(self, pl_module: pl.LightningModule) -> list[nn.Parameter]:
        named = _model(pl_module).named_parameters()
        return [weight for name, weight in named if any(fnmatchcase(name, pattern) for pattern in self.parameters)]


def _model(pl_module: pl.LightningModule) -> nn.Module:
    model = getattr(pl_module, "model", pl_module)
    assert isinstance(model, nn.Module)
    return model
