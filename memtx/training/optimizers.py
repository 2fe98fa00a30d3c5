"""Weight decay groups and the default schedule."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from memtx.errors import MemtxError


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return the parameters in two groups: matrices, and the rest (norms, biases, gates) without decay."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in learning if parameter.dim() >= 2]},
        {"params": [parameter for parameter in learning if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


_SETTINGS = ("warmup", "steps", "floor")


class WarmupCosine(LambdaLR):
    """Linear warm-up, then half a cosine down to a floor (SGDR, Loshchilov and Hutter 2017, section 3).

    Args:
        optimizer: whose rates are scaled.
        warmup: optimiser steps until the full rate.
        steps: optimiser steps until the floor; 0 for the run's own number.
        floor: the last rate as a share of the full one.

    Raises:
        MemtxError: a number is out of range.
    """

    def __init__(self, optimizer: Optimizer, warmup: int = 100, steps: int = 0, floor: float = 0.1) -> None:
        if warmup < 0 or steps < 0 or not 0.0 <= floor <= 1.0:
            raise MemtxError(
                f"The schedule got warmup={warmup}, steps={steps}, floor={floor}.",
                "Give steps of at least 0 and a floor from 0 to 1.",
            )
        self.warmup = warmup
        self.steps = steps
        self.floor = floor
        super().__init__(optimizer, self._share)

    def state_dict(self) -> dict[str, Any]:
        """Return how far it is, not what it was asked for: a run that goes on with other settings has these."""
        return {key: value for key, value in super().state_dict().items() if key not in _SETTINGS}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        super().load_state_dict({key: value for key, value in state_dict.items() if key not in _SETTINGS})

    def _share(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.steps <= self.warmup:
            return 1.0
        done = min(1.0, (step - self.warmup) / (self.steps - self.warmup))
        return self.floor + (1.0 - self.floor) * 0.5 * (1.0 + math.cos(math.pi * done))
