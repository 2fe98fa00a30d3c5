"""Rotary embeddings and their frequencies, including the scalings for texts longer than those trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from memtx.errors import MemtxError, check_at_least, check_positive
from memtx.layers.positions.base import Memoize, Positions
from memtx.ops.rotary import apply_rotary_emb, rotary_angles


class RotaryFrequencies:
    """Frequencies base^(-2i / head_dim) of pair i, in radians per position (RoFormer, Su et al. 2021, section 3.2.2).

    Args:
        head_dim: Width of a head, even.
        base: Base of the frequencies; the slowest pair's period is about 2 pi times this.

    Attributes:
        attention_factor: Factor of rotated queries and keys, each.
    """

    attention_factor = 1.0

    def __init__(self, head_dim: int, base: float) -> None:
        self.head_dim = head_dim
        self.base = base

    @property
    def cache_key(self) -> tuple[object, ...]:
        """Key that is equal for equal frequencies."""
        return (type(self), *sorted(vars(self).items()))

    def inv_freq(self, device: torch.device) -> Tensor:
        """Return the angle of each pair per position in radians, ``(head_dim / 2,)`` float64."""
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=device) / self.head_dim
        return self.base**-exponent


class LinearScaling(RotaryFrequencies):
    """Position interpolation: positions are divided by a factor (Chen et al. 2023, section 2.2).

    Args:
        head_dim: Width of a head, even.
        base: Base of the frequencies.
        scaling_factor: Factor that positions are divided by.

    Raises:
        MemtxError: scaling_factor is not positive.
    """

    def __init__(self, head_dim: int, base: float, scaling_factor: float) -> None:
        super().__init__(head_dim, base)
        check_positive(scaling_factor=scaling_factor)
        self.scaling_factor = float(scaling_factor)

    def inv_freq(self, device: torch.device) -> Tensor:
        """Return all frequencies divided by the factor."""
        return super().inv_freq(device) / self.scaling_factor


class Llama3Scaling(RotaryFrequencies):
    """Slow pairs are slowed down, fast ones are not, and those between are interpolated (Llama 3.1's published code).

    Args:
        head_dim: Width of a head, even.
        base: Base of the frequencies.
        scaling_factor: Factor by which slow pairs are slowed down.
        low_freq_factor: Pairs with fewer periods than this in ``original_max_length`` positions are slow.
        high_freq_factor: Pairs with more periods than this are fast.
        original_max_length: Length of the texts first trained on.

    Raises:
        MemtxError: A number is out of range.
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
        self.low_freq_factor = low_freq_factor
        self.high_freq_factor = high_freq_factor
        self.original_max_length = original_max_length

    def inv_freq(self, device: torch.device) -> Tensor:
        """Return frequencies interpolated by each pair's number of periods in the trained length."""
        unscaled = super().inv_freq(device)
        periods = self.original_max_length * unscaled / (2 * math.pi)
        ramp = ((periods - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0.0, 1.0)
        return torch.lerp(unscaled / self.scaling_factor, unscaled, ramp)


class YarnScaling(RotaryFrequencies):
    """Slow pairs are interpolated, fast ones are not, and scores are sharpened (YaRN, Peng et al. 2023, section 3).

    Args:
        head_dim: Width of a head, even.
        base: Base of the frequencies.
        scaling_factor: Factor by which slow pairs are slowed down.
        original_max_length: Length of the texts first trained on.
        beta_fast: Pairs with more periods than this in ``original_max_length`` positions are unchanged.
        beta_slow: Pairs with fewer periods than this are slowed down fully.
        attention_factor: Factor of rotated queries and keys. Defaults to the paper's 0.1 ln(scaling_factor) + 1
            (section 3.4).
        truncate: If True, the bounds between fast and slow are rounded to whole pairs.

    Raises:
        MemtxError: A number is out of range.
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

    def inv_freq(self, device: torch.device) -> Tensor:
        """Return frequencies interpolated by a ramp over the pairs."""
        unscaled = super().inv_freq(device)
        # The indices of the pairs with these numbers of periods in the trained length.
        first, last = (
            self.head_dim * math.log(self.original_max_length / (2 * math.pi * periods)) / (2 * math.log(self.base))
            for periods in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, self.head_dim - 1)
        if first == last:
            last += 0.001
        pair = torch.arange(self.head_dim // 2, dtype=torch.float64, device=device)
        ramp = ((pair - first) / (last - first)).clamp(0.0, 1.0)
        return torch.lerp(unscaled, unscaled / self.scaling_factor, ramp)


class LongRopeScaling(RotaryFrequencies):
    """A searched factor per pair slows it down (LongRoPE, Ding et al. 2024, section 3; as in Phi-3).

    Args:
        head_dim: Width of a head, even.
        base: Base of the frequencies.
        factors: Factor of each pair.
        attention_factor: Factor of rotated queries and keys.

    Raises:
        MemtxError: The number of factors is not that of the pairs.
    """

    def __init__(self, head_dim: int, base: float, factors: Sequence[float], attention_factor: float = 1.0) -> None:
        super().__init__(head_dim, base)
        if len(factors) != head_dim // 2:
            message = f"LongRope has {len(factors)} factors for {head_dim // 2} pairs of channels."
            raise MemtxError(message, "Give one factor per pair.")
        self.factors, self.attention_factor = tuple(map(float, factors)), attention_factor

    def inv_freq(self, device: torch.device) -> Tensor:
        """Return all frequencies divided by their factors."""
        return super().inv_freq(device) / torch.tensor(self.factors, dtype=torch.float64, device=device)


class Rotary(Positions):
    """Rotary embedding (RoFormer, Su et al. 2021, section 3.2).

    Args:
        heads: Number of query heads.
        head_dim: Width of a head, even.
        base: Base of the frequencies; the slowest pair's period is about 2 pi times this.
        frequencies: Factory of the frequencies from (rotary_dim, base).
        rotary_dim: Number of leading channels of a head that are rotated, even. Defaults to all.

    Raises:
        MemtxError: The number of rotated channels is odd or out of range.
    """

    is_rotation = True

    def __init__(
        self,
        heads: int,
        head_dim: int,
        base: float = 10000.0,
        frequencies: Callable[[int, float], RotaryFrequencies] = RotaryFrequencies,
        rotary_dim: int | None = None,
    ) -> None:
        super().__init__(heads, head_dim)
        if head_dim % 2:
            raise MemtxError(f"Rotary positions need an even width per head, got {head_dim}.", "Change dim or heads.")
        rotary_dim = rotary_dim if rotary_dim is not None else head_dim
        if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
            raise MemtxError(f"rotary_dim is {rotary_dim}.", f"Give an even number of at most {head_dim}.")
        self.base = base
        self.rotary_dim = rotary_dim
        self.frequencies = frequencies(rotary_dim, base)

    def extra_repr(self) -> str:
        """Return the base."""
        return f"base={self.base}"

    def apply_absolute(self, x: Tensor, position: Tensor, memo: Memoize) -> Tensor:
        """Rotate by the position; angles are computed in float64, so they are exact in streams of any length."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return apply_rotary_emb(x, self.rotation(position, memo, dtype))

    def rotation(self, position: Tensor, memo: Memoize, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the cosines and sines in ``dtype``."""
        key = (Rotary, self.head_dim, self.frequencies.cache_key, dtype)
        angles: Tensor = memo(key, lambda: self._angles(position, dtype))
        return angles

    def apply_relative(self, keys: Tensor, distance: Tensor) -> Tensor:
        """Rotate back by the distance, with the attention factor of the query, which is not rotated."""
        angles = self._angles(-distance[None], torch.promote_types(keys.dtype, torch.float32))
        angles[..., : self.rotary_dim // 2, :] *= self.frequencies.attention_factor
        return apply_rotary_emb(keys, angles)

    def _angles(self, offset: Tensor, dtype: torch.dtype) -> Tensor:
        inv_freq = self.frequencies.inv_freq(offset.device)
        angles = rotary_angles(offset, inv_freq, dtype, self.frequencies.attention_factor)
        if self.rotary_dim < self.head_dim:
            # The other channels are rotated by nothing: cosine 1, sine 0.
            shape = (*angles.shape[:-2], (self.head_dim - self.rotary_dim) // 2, 2)
            angles = torch.cat([angles, angles.new_tensor([1.0, 0.0]).expand(shape)], dim=-2)
        return angles
