"""How fast rotary pairs turn: as first published, or scaled for texts longer than those trained on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memtx.errors import MemtxError, check_at_least, check_positive


class RotaryFrequencies:
    """Pair i turns by base^(-2i / head_dim) a position (RoFormer, Su et al. 2021, section 3.2.2).

    Args:
        head_dim: width of a head, even.
        base: the slowest pair's period is about 2 pi times this.

    Attributes:
        attention_factor: what rotated queries and keys are multiplied with, each.
    """

    attention_factor = 1.0

    def __init__(self, head_dim: int, base: float) -> None:
        self.head_dim = head_dim
        self.base = base

    @property
    def cache_key(self) -> tuple[object, ...]:
        """Equal for equal frequencies."""
        return (type(self), *sorted(vars(self).items()))

    def inv_freq(self, device: torch.device) -> Tensor:
        """Return (head_dim / 2,) float64: how far each pair turns a position, in radians."""
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=device) / self.head_dim
        return self.base**-exponent


class LinearScaling(RotaryFrequencies):
    """Positions are divided by a factor (position interpolation, Chen et al. 2023, section 2.2).

    Args:
        head_dim: width of a head, even.
        base: as in :class:`RotaryFrequencies`.
        scaling_factor: by what positions are divided.

    Raises:
        MemtxError: the factor is not positive.
    """

    def __init__(self, head_dim: int, base: float, scaling_factor: float) -> None:
        super().__init__(head_dim, base)
        check_positive(scaling_factor=scaling_factor)
        self.scaling_factor = float(scaling_factor)

    def inv_freq(self, device: torch.device) -> Tensor:
        """Turn all pairs slower."""
        return super().inv_freq(device) / self.scaling_factor


class Llama3Scaling(RotaryFrequencies):
    """Slow pairs turn slower, fast ones as ever, those between by a mixture (Llama 3.1's published code).

    Args:
        head_dim: width of a head, even.
        base: as in :class:`RotaryFrequencies`.
        scaling_factor: by what the slow pairs are slowed down.
        low_freq_factor: pairs that turn less than this often in ``original_max_length`` positions are slow.
        high_freq_factor: pairs that turn more often are fast.
        original_max_length: positions of the texts first trained on.

    Raises:
        MemtxError: a number is out of range.
    """

    def __init__(
        self,
        head_dim: int,
        base: float,
        scaling_factor: float,
        low_freq_factor: float,
        high_freq_factor: float,
        original_max_length: int,
    ) -> None:
        super().__init__(head_dim, base)
        check_at_least(1, original_max_length=original_max_length)
        if not 0 < low_freq_factor < high_freq_factor:
            raise MemtxError(
                f"low_freq_factor is {low_freq_factor}, high_freq_factor is {high_freq_factor}.",
                "Give 0 < low_freq_factor < high_freq_factor.",
            )
        check_positive(scaling_factor=scaling_factor)
        self.scaling_factor = float(scaling_factor)
        self.low_freq_factor, self.high_freq_factor, self.original_max_length = (
            low_freq_factor,
            high_freq_factor,
            original_max_length,
        )

    def inv_freq(self, device: torch.device) -> Tensor:
        """Mix by how often a pair turns in the trained positions."""
        plain = super().inv_freq(device)
        turns = self.original_max_length * plain / (2 * math.pi)
        share = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0.0, 1.0)
        return torch.lerp(plain / self.scaling_factor, plain, share)


class YarnScaling(RotaryFrequencies):
    """Slow pairs are interpolated, fast ones not, and scores are sharper (YaRN, Peng et al. 2023, section 3).

    Args:
        head_dim: width of a head, even.
        base: as in :class:`RotaryFrequencies`.
        scaling_factor: by what the slow pairs are slowed down.
        original_max_length: positions of the texts first trained on.
        beta_fast: pairs that turn more often than this in ``original_max_length`` positions are left.
        beta_slow: pairs that turn less often are slowed down wholly.
        attention_factor: of rotated queries and keys; None for the paper's 0.1 ln(scaling_factor) + 1 (section 3.4).
        truncate: whether the bounds between fast and slow are rounded to whole pairs.

    Raises:
        MemtxError: a number is out of range.
    """

    def __init__(
        self,
        head_dim: int,
        base: float,
        scaling_factor: float,
        original_max_length: int,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
        attention_factor: float | None = None,
        truncate: bool = True,
    ) -> None:
        super().__init__(head_dim, base)
        check_at_least(1, original_max_length=original_max_length)
        check_positive(scaling_factor=scaling_factor, beta_fast=beta_fast, beta_slow=beta_slow)
        self.scaling_factor, self.original_max_length = float(scaling_factor), original_max_length
        self.beta_fast, self.beta_slow = float(beta_fast), float(beta_slow)
        self.attention_factor = (
            attention_factor if attention_factor is not None else 0.1 * math.log(max(scaling_factor, 1.0)) + 1.0
        )
        self.truncate = truncate

    def _correction_dim(self, num_rotations: float) -> float:
        """Return which pair turns so often in the trained positions."""
        return (
            self.head_dim
            * math.log(self.original_max_length / (2 * math.pi * num_rotations))
            / (2 * math.log(self.base))
        )

    def inv_freq(self, device: torch.device) -> Tensor:
        """Mix by a ramp over the pairs."""
        plain = super().inv_freq(device)
        first, last = self._correction_dim(self.beta_fast), self._correction_dim(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, self.head_dim - 1)
        if first == last:
            last += 0.001
        pair = torch.arange(self.head_dim // 2, dtype=torch.float64, device=device)
        return torch.lerp(plain, plain / self.scaling_factor, ((pair - first) / (last - first)).clamp(0.0, 1.0))
