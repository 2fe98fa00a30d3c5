"""Gates that can be exactly zero, so that what is kept is kept exactly."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from memtx.errors import check_at_least
from memtx.ops.cpu.linear import Linear


class Gate(nn.Module):
    """A sigmoid stretched beyond [0, 1] and cut there (the hard concrete of Louizos et al. 2018, without its noise).

    A sigmoid never closes: what leaks in at every token drowns a memory in a long stream. Stretched, it is exactly 0
    (and exactly 1) at finite inputs.

    Args:
        dim: width of what decides.
        num_gates: gates for each.
        bias_init: of the input at the beginning; below 0 for writing little.
        stretch: how far beyond both ends; 0 for the plain sigmoid.

    Attributes:
        max_value: what it gives at most.

    Raises:
        MemtxError: the stretch is negative.
    """

    max_value: ClassVar[float] = 1.0

    def __init__(self, dim: int, num_gates: int, bias_init: float = -1.0, stretch: float = 0.1) -> None:
        super().__init__()
        check_at_least(0, stretch=stretch)
        self.stretch = stretch
        self.proj = Linear(dim, num_gates)
        nn.init.constant_(self.proj.bias, bias_init)

    def extra_repr(self) -> str:
        """Say the stretch."""
        return f"stretch={self.stretch}"

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dim) to (..., num_gates) numbers from 0 to 1."""
        wide = (1 + 2 * self.stretch) * torch.sigmoid(self.proj(x)) - self.stretch
        return wide.clamp(0.0, 1.0)


class ReflectingGate(Gate):
    """A gate up to 2, for the write of a delta rule that keeps track of a state.

    A write of strength b multiplies what lies along its key by 1 - b. Up to 1 that is forgetting; between 1 and 2 it
    also turns the sign, and at 2, along the difference of two places, it exchanges what they hold: what parity and
    permutations need and no b up to 1 can do (Grazzi et al. 2024, sections 3 and 4).
    """

    max_value: ClassVar[float] = 2.0

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dim) to (..., num_gates) numbers from 0 to 2."""
        return self.max_value * super().forward(x)
