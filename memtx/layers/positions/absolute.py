"""Absolute position embeddings: learned tables of a decoder and of Reformer, and Reformer's axial ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from memtx.errors import MemtxError, check_at_least


class LearnedPositions(nn.Module):
    """One vector for each of the first ``num_positions`` positions of a document (GPT-2, Radford et al. 2019, 2.3).

    Beyond the table a stream cycles through its upper half: the vectors that mark a document's start do not return, and
    the newest half table of tokens keeps its order except where the half wraps around. No model was trained this way,
    so measure what it is worth; for longer texts the window should be at most half the table.

    Args:
        dim: Width of the hidden states.
        num_positions: Size of the table.

    Raises:
        MemtxError: num_positions is below 2.
    """

    def __init__(self, dim: int, num_positions: int) -> None:
        super().__init__()
        check_at_least(2, num_positions=num_positions)
        self.num_positions = num_positions
        self.table = nn.Embedding(num_positions, dim)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, position: Tensor) -> Tensor:
        """Embed positions (...) int64, however large, as ``(..., dim)``."""
        start = self.num_positions - self.num_positions // 2
        wrapped = start + (position - start) % (self.num_positions // 2)
        out: Tensor = self.table(position.where(position < self.num_positions, wrapped))
        return out


class PositionEmbeddings(nn.Module):
    """One vector, ``dim`` wide, for each of ``max_length`` positions, for whole texts."""

    def __init__(self, dim: int, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.table = nn.Embedding(max_length, dim)

    def forward(self, length: int) -> Tensor:
        """Return the embeddings of the first positions, ``(length, dim)``."""
        return self.table.weight[:length]


class AxialPositionEmbeddings(nn.Module):
    """Positions on a grid, with one small table per axis (Reformer, Kitaev, Kaiser and Levskaya 2020, appendix D).

    A position's embedding is the concatenation of its coordinates' embeddings.

    Args:
        dim: Width of the hidden states.
        shape: Size of the grid; the last axis varies fastest.
        axis_dims: Width of each axis' embeddings; their sum is dim.

    Raises:
        MemtxError: axis_dims do not sum to dim, or do not match shape.
    """

    def __init__(self, dim: int, shape: Sequence[int], axis_dims: Sequence[int]) -> None:
        super().__init__()
        if sum(axis_dims) != dim or len(axis_dims) != len(shape) or not all(n > 0 for n in (*shape, *axis_dims)):
            raise MemtxError(
                f"shape is {list(shape)} and axis_dims is {list(axis_dims)}, but dim is {dim}.",
                "Give one positive width per axis, with sum dim.",
            )
        self.shape = tuple(shape)
        self.weights = nn.ParameterList(
            torch.empty([size if other == axis else 1 for other in range(len(shape))] + [width])
            for axis, (size, width) in enumerate(zip(shape, axis_dims, strict=True))
        )

    @property
    def max_length(self) -> int:
        """Number of positions."""
        return math.prod(self.shape)

    def forward(self, length: int) -> Tensor:
        """Return the embeddings of the first positions, ``(length, dim)``."""
        position = torch.arange(length, device=self.weights[0].device)
        parts, stride = [], self.max_length
        for size, weight in zip(self.shape, self.weights, strict=True):
            stride //= size
            parts.append(weight.flatten(0, -2)[position // stride % size])
        return torch.cat(parts, dim=-1)
