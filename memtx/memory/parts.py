"""Parts that several memories are built from: gates, feature maps, the token shift and head reshaping."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.errors import MemtxError, check_at_least
from memtx.ops.cpu.linear import Linear
from memtx.segment import Segment


class Gate(nn.Module):
    """A stretched sigmoid clamped to [0, 1] (hard concrete without its noise, Louizos et al. 2018).

    A plain sigmoid never closes, and its leak at every token drowns a memory in a long stream. This gate reaches 0
    and 1 exactly at finite inputs.

    Args:
        dim: Input width.
        num_gates: Gates per token.
        bias_init: Initial bias; below 0, little is written at first.
        stretch: Stretch beyond both ends of [0, 1]; 0 gives the plain sigmoid.

    Attributes:
        max_value: Largest output.

    Raises:
        MemtxError: stretch is negative.
    """

    max_value: ClassVar[float] = 1.0

    def __init__(self, dim: int, num_gates: int, bias_init: float = -1.0, stretch: float = 0.1) -> None:
        super().__init__()
        check_at_least(0, stretch=stretch)
        self.stretch = stretch
        self.proj = Linear(dim, num_gates)
        nn.init.constant_(self.proj.bias, bias_init)

    def extra_repr(self) -> str:
        """Return the stretch."""
        return f"stretch={self.stretch}"

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., dim)`` to ``(..., num_gates)`` gates from 0 to ``max_value``."""
        stretched = (1 + 2 * self.stretch) * torch.sigmoid(self.proj(x)) - self.stretch
        return stretched.clamp(0.0, 1.0)


class ReflectingGate(Gate):
    """A gate from 0 to 2, the write gate of a delta rule that tracks a state.

    A write of strength b multiplies the content along its key by 1 - b. Up to b = 1 that only forgets; between 1 and 2
    it also flips the sign, and at 2 along the difference of two addresses it swaps their contents. Parity and
    permutations need this (Grazzi et al. 2024, sections 3 and 4).
    """

    max_value: ClassVar[float] = 2.0

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., dim)`` to ``(..., num_gates)`` gates from 0 to 2."""
        return self.max_value * super().forward(x)


class FeatureMap(nn.Module, ABC):
    """A map from a head's keys and queries to addresses of a fast-weight memory.

    Args:
        key_dim: Key width per head.

    Attributes:
        feature_dim: Output width.
        is_nonnegative: If True, outputs are never negative, so products of keys and queries are weights.
    """

    is_nonnegative: ClassVar[bool] = False

    def __init__(self, key_dim: int) -> None:
        super().__init__()
        self.feature_dim = key_dim

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., key_dim)`` to ``(..., feature_dim)``."""


class NormalizedFeatureMap(FeatureMap):
    """Unit length (DeltaNet, Yang et al. 2024, section 3.1), so that the delta rule replaces the old value exactly."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize to unit length."""
        return F.normalize(x, dim=-1)


class EluFeatureMap(FeatureMap):
    """ELU + 1 (Katharopoulos et al. 2020, equation 7; Infini-attention), normalized to unit length."""

    is_nonnegative = True

    def forward(self, x: Tensor) -> Tensor:
        """Map to positive features."""
        return F.normalize(F.elu(x) + 1.0, dim=-1)


class DPFPFeatureMap(FeatureMap):
    """Products of neighboring rectified channels (Schlag et al. 2021, section 5.3; ARMT).

    The features are sparse and ``2 * order`` times as wide as a key, so more keys fit without interfering.

    Args:
        key_dim: Key width per head.
        order: Neighbors that each channel is multiplied with.
        normalize: If True, normalize to unit length.

    Raises:
        MemtxError: order is not between 1 and 2 * key_dim - 1.
    """

    is_nonnegative = True

    def __init__(self, key_dim: int, order: int = 3, normalize: bool = True) -> None:
        super().__init__(key_dim)
        self.normalize = normalize
        if not 1 <= order < 2 * key_dim:
            raise MemtxError(f"order is {order} for keys of width {key_dim}.", f"Give 1 to {2 * key_dim - 1}.")
        self.order = order
        self.feature_dim = 2 * key_dim * order

    def extra_repr(self) -> str:
        """Return the order."""
        return f"order={self.order}"

    def forward(self, x: Tensor) -> Tensor:
        """Map to products of channels."""
        rectified = F.relu(torch.cat([x, -x], dim=-1))
        products = [rectified * rectified.roll(shift, dims=-1) for shift in range(1, self.order + 1)]
        features = torch.cat(products, dim=-1)
        return F.normalize(features, dim=-1) if self.normalize else features


class TokenShift(nn.Module):
    """A learned mix, per channel, of each token with the previous one of its document (RWKV, Peng et al. 2023, 3.1).

    With it a memory can store "this value came after that key" in one write, which projections of single tokens cannot.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        # From channels that keep the token to channels that take the previous one.
        self.mix_ratio = nn.Parameter(torch.linspace(0.0, 1.0, dim))

    def forward(self, x: Tensor, last_input: Tensor, segment: Segment) -> Tensor:
        """Mix each token of x ``(batch, length, dim)`` with the previous one, a document's first token with zeros.

        ``last_input``, ``(batch, dim)``, comes before the segment's first token; it is unused where a document begins.
        """
        previous = torch.cat([last_input[:, None].to(x.dtype), x[:, :-1]], dim=1)
        previous = previous.masked_fill((segment.position == 0)[..., None], 0.0)
        return torch.lerp(x, previous, self.mix_ratio.to(x.dtype))

    @staticmethod
    def last_input(x: Tensor) -> Tensor:
        """Return a copy of the last input, ``(batch, dim)``, for the next segment; a view would keep all of x alive."""
        return x[:, -1].clone()


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Reshape ``(..., length, heads * width)`` to ``(..., heads, length, width)``."""
    return x.reshape(*x.shape[:-1], heads, -1).transpose(-3, -2)


def merge_heads(x: Tensor) -> Tensor:
    """Reshape ``(..., heads, length, width)`` to ``(..., length, heads * width)``."""
    return x.transpose(-3, -2).flatten(-2)


def gather_entries(x: Tensor, index: Tensor) -> Tensor:
    """Return x ``(batch, length, dim)`` at index ``(batch, ...)``, as ``(batch, ..., dim)``."""
    # index_select over the flattened batch is many times faster on the CPU than gather with an expanded index.
    offset = torch.arange(x.shape[0], device=x.device).view(-1, *(1,) * (index.dim() - 1)) * x.shape[1]
    return x.flatten(0, 1).index_select(0, (offset + index).flatten()).view(*index.shape, x.shape[2])
