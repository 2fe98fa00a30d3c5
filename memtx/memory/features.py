"""Feature maps of keys and queries of a fast-weight memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.errors import MemtxError


class FeatureMap(nn.Module, ABC):
    """From a head's key or query to what the memory is addressed by.

    Args:
        key_dim: width of a head's keys.

    Attributes:
        feature_dim: of what it gives.
        is_nonnegative: whether it gives no negative numbers, so that products of keys and queries are weights.
    """

    is_nonnegative: ClassVar[bool] = False

    def __init__(self, key_dim: int) -> None:
        super().__init__()
        self.feature_dim = key_dim

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Map (..., key_dim) to (..., feature_dim)."""


class NormalizedFeatureMap(FeatureMap):
    """Of length 1 (as DeltaNet's keys, Yang et al. 2024, section 3.1): then the delta rule replaces what was there."""

    def forward(self, x: Tensor) -> Tensor:
        """Divide by the length."""
        return F.normalize(x, dim=-1)


class EluFeatureMap(FeatureMap):
    """ELU + 1 (Katharopoulos et al. 2020, equation 7; Infini-attention's), made of length 1."""

    is_nonnegative = True

    def forward(self, x: Tensor) -> Tensor:
        """Map to positive numbers."""
        return F.normalize(F.elu(x) + 1.0, dim=-1)


class DPFPFeatureMap(FeatureMap):
    """Products of neighbouring rectified numbers (Schlag et al. 2021, section 5.3; ARMT's), made of length 1.

    Sparse and 2 x ``order`` times as wide as a key: room for more keys that do not disturb each other.

    Args:
        key_dim: width of a head's keys.
        order: how many neighbours each number is multiplied with.

    Raises:
        MemtxError: the order is not between 1 and 2 x key_dim - 1.
    """

    is_nonnegative = True

    def __init__(self, key_dim: int, order: int = 3) -> None:
        super().__init__(key_dim)
        if not 1 <= order < 2 * key_dim:
            raise MemtxError(f"order is {order} for keys of {key_dim}.", f"Give 1 to {2 * key_dim - 1}.")
        self.order = order
        self.feature_dim = 2 * key_dim * order

    def extra_repr(self) -> str:
        """Say the order."""
        return f"order={self.order}"

    def forward(self, x: Tensor) -> Tensor:
        """Map to products."""
        both = F.relu(torch.cat([x, -x], dim=-1))
        products = [both * both.roll(shift, dims=-1) for shift in range(1, self.order + 1)]
        return F.normalize(torch.cat(products, dim=-1), dim=-1)
