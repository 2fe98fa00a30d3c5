"""How fast rotary pairs turn: as first published, or scaled for texts longer than those trained on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memtx.errors import MemtxError, at_least, positive


class Frequencies:
    """Pair i turns by base^(-2i / head_dim) a position (RoFormer, Su et al. 2021, section 3.2.2).

    Args:
        head_dim: width of a head, even.
        base: the slowest pair's period is about 2 pi times this.

    Attributes:
        factor: what rotated queries and keys are multiplied with, each.
    """

    factor = 1.0

    def __init__(self, head_dim: int, base: float) -> None:
        self.head_dim = head_dim
        self.base = base

    @property
    def settings(self) -> tuple[object, ...]:
        """Equal for equal frequencies."""
        return (type(self), *sorted(vars(self).items()))

    def inverse(self, device: torch.device) -> Tensor:
        """Return (head_dim / 2,) float64: how far each pair turns a position, in radians."""
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=device) / self.head_dim
        return self.base**-exponent


class LinearScaling(Frequencies):
    """Positions are divided by a factor (position interpolation, Chen et al. 2023, section 2.2).

    Args:
        head_dim: width of a head, even.
        base: as in :class:`Frequencies`.
        stretch: by what positions are divided.

    Raises:
        MemtxError: the factor is not positive.
    """

    def __init__(self, head_dim: int, base: float, stretch: float) -> None:
        super().__init__(head_dim, base)
        positive(stretch=stretch)
        self.stretch = float(stretch)

    def inverse(self, device: torch.device) -> Tensor:
        """Turn all pairs slower."""
        return super().inverse(device) / self.stretch


class Llama3Scaling(Frequencies):
    """Slow pairs turn slower, fast ones as ever, those between by a mixture (Llama 3.1's published code).

    Args:
        head_dim: width of a head, even.
        base: as in :class:`Frequencies`.
        stretch: by what the slow pairs are slowed down.
        low: pairs that turn less than this often in ``trained`` positions are slow.
        high: pairs that turn more often are fast.
        trained: positions of the texts first trained on.

    Raises:
        MemtxError: a number is out of range.
    """

    def __init__(self, head_dim: int, base: float, stretch: float, low: float, high: float, trained: int) -> None:
        super().__init__(head_dim, base)
        at_least(1, trained=trained)
        if not 0 < low < high:
            raise MemtxError(f"low is {low}, high is {high}.", "Give 0 < low < high.")
        positive(stretch=stretch)
        self.stretch = float(stretch)
        self.low, self.high, self.trained = low, high, trained

    def inverse(self, device: torch.device) -> Tensor:
        """Mix by how often a pair turns in the trained positions."""
        plain = super().inverse(device)
        turns = self.trained * plain / (2 * math.pi)
        share = ((turns - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
        return torch.lerp(plain / self.stretch, plain, share)


class YarnScaling(Frequencies):
    """Slow pairs are interpolated, fast ones not, and scores are sharper (YaRN, Peng et al. 2023, section 3).

    Args:
        head_dim: width of a head, even.
        base: as in :class:`Frequencies`.
        stretch: by what the slow pairs are slowed down.
        trained: positions of the texts first trained on.
        fast: pairs that turn more often than this in ``trained`` positions are left.
        slow: pairs that turn less often are slowed down wholly.
        factor: of rotated queries and keys; None for the paper's 0.1 ln(stretch) + 1 (section 3.4).
        truncate: whether the bounds between fast and slow are rounded to whole pairs.

    Raises:
        MemtxError: a number is out of range.
    """

    def __init__(
        self,
        head_dim: int,
        base: float,
        stretch: float,
        trained: int,
        fast: float = 32.0,
        slow: float = 1.0,
        factor: float | None = None,
        truncate: bool = True,
    ) -> None:
        super().__init__(head_dim, base)
        at_least(1, trained=trained)
        positive(stretch=stretch, fast=fast, slow=slow)
        self.stretch, self.trained = float(stretch), trained
        self.fast, self.slow = float(fast), float(slow)
        self.factor = factor if factor is not None else 0.1 * math.log(max(stretch, 1.0)) + 1.0
        self.truncate = truncate

    def _pair(self, turns: float) -> float:
        """Return which pair turns so often in the trained positions."""
        return self.head_dim * math.log(self.trained / (2 * math.pi * turns)) / (2 * math.log(self.base))

    def inverse(self, device: torch.device) -> Tensor:
        """Mix by a ramp over the pairs."""
        plain = super().inverse(device)
        first, last = self._pair(self.fast), self._pair(self.slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, self.head_dim - 1)
        if first == last:
            last += 0.001
        pair = torch.arange(self.head_dim // 2, dtype=torch.float64, device=device)
        return torch.lerp(plain, plain / self.stretch, ((pair - first) / (last - first)).clamp(0.0, 1.0))
