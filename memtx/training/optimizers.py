"""Weight decay groups and the default schedule."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from memtx.errors import MemtxError


def make_param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return the parameters in two groups: matrices, and the rest (norms, biases, gates) without decay."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in learning if parameter.dim() >= 2]},
        {"params": [parameter for parameter in learning if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


_CONFIG_KEYS = ("warmup_steps", "total_steps", "min_lr_ratio")


class WarmupCosine(LambdaLR):
    """Linear warm-up, then half a cosine down to a floor (SGDR, Loshchilov and Hutter 2017, section 3).

    Args:
        optimizer: whose rates are scaled.
        warmup_steps: optimiser steps until the full rate.
        total_steps: optimiser steps until the floor; 0 for the run's own number.
        min_lr_ratio: the last rate as a share of the full one.

    Raises:
        MemtxError: a number is out of range.
    """

    def __init__(
        self, optimizer: Optimizer, warmup_steps: int = 100, total_steps: int = 0, min_lr_ratio: float = 0.1
    ) -> None:
        if warmup_steps < 0 or total_steps < 0 or not 0.0 <= min_lr_ratio <= 1.0:
            raise MemtxError(
                f"The schedule got warmup_steps={warmup_steps}, total_steps={total_steps}, "
                f"min_lr_ratio={min_lr_ratio}.",
                "Give steps of at least 0 and a min_lr_ratio from 0 to 1.",
            )
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.min_lr_ratio = min_lr_ratio
        super().__init__(optimizer, self._lr_scale)

    def state_dict(self) -> dict[str, Any]:
        """Return how far it is, not what it was asked for: a run that goes on with other settings has these."""
        return {key: value for key, value in super().state_dict().items() if key not in _CONFIG_KEYS}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        super().load_state_dict({key: value for key, value in state_dict.items() if key not in _CONFIG_KEYS})

    def _lr_scale(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.total_steps <= self.warmup_steps:
            return 1.0
        done = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * done))
