"""Positions as the points of a grid: one small table for each axis instead of a long one (Reformer).

Kitaev, Kaiser and Levskaya 2020, appendix D.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from memtx.errors import MemtxError


class AxialPositionEmbeddings(nn.Module):
    """A position's embedding is its coordinates' embeddings side by side.

    Args:
        dim: width of the hidden states.
        shape: the grid, whose last axis runs fastest.
        axis_dims: of the axes' embeddings, dim together.

    Raises:
        MemtxError: the widths do not add up to dim, or there is not one for each axis.
    """

    def __init__(self, dim: int, shape: Sequence[int], axis_dims: Sequence[int]) -> None:
        super().__init__()
        if sum(axis_dims) != dim or len(axis_dims) != len(shape) or not all(n > 0 for n in (*shape, *axis_dims)):
            raise MemtxError(
                f"A grid of {list(shape)} has widths {list(axis_dims)}, dim is {dim}.",
                "Give one positive width for each axis, dim together.",
            )
        self.shape = tuple(shape)
        self.weights = nn.ParameterList(
            torch.empty([size if other == axis else 1 for other in range(len(shape))] + [width])
            for axis, (size, width) in enumerate(zip(shape, axis_dims, strict=True))
        )

    @property
    def max_length(self) -> int:
        """Positions there are."""
        return math.prod(self.shape)

    def forward(self, length: int) -> Tensor:
        """Return the embeddings of the first positions, (length, dim)."""
        place = torch.arange(length, device=self.weights[0].device)
        parts, stride = [], self.max_length
        for size, weight in zip(self.shape, self.weights, strict=True):
            stride //= size
            parts.append(weight.flatten(0, -2)[place // stride % size])
        return torch.cat(parts, dim=-1)


class PositionEmbeddings(nn.Module):
    """One embedding a position.

    Args:
        dim: width of the hidden states.
        max_length: positions there are.
    """

    def __init__(self, dim: int, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.table = nn.Embedding(max_length, dim)

    def forward(self, length: int) -> Tensor:
        """Return the embeddings of the first positions, (length, dim)."""
        return self.table.weight[:length]
