"""The interface of position encodings.

All are relative and computed from offsets, which count from the call's first token and so stay small however long the
stream is. A compressed entry is at the center of its block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor, nn

from memtx.memory.base import EntryPositions
from memtx.ops.attention.bias import AlibiBias
from memtx.segment import Segment

Memoize = Callable[[Hashable, Callable[[], Any]], Any]
"""A function that returns the value of a key, computed on its first use (see :meth:`memtx.memo.Memo.memo`)."""


class Positions(nn.Module, ABC):
    """A layer's position encoding.

    Args:
        heads: Number of query heads.
        head_dim: Width of a head.
    """

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim

    @abstractmethod
    def forward(
        self, q: Tensor, k: Tensor, entry_positions: EntryPositions, segment: Segment
    ) -> tuple[Tensor, Tensor, AlibiBias | None]:
        """Return queries and keys with positions, and an additive bias of their scores.

        Args:
            q: Queries, ``(batch, length, heads, head_dim)``.
            k: Keys, ``(batch, entries, kv_heads, head_dim)``.
            entry_positions: Positions of the entries.
            segment: Positions of the queries.
        """

    def apply_absolute(self, x: Tensor, position: Tensor, memo: Memoize) -> Tensor:
        """Return queries or keys in the form in which a ring buffer keeps them.

        Args:
            x: Queries or keys, ``(batch, entries, heads, head_dim)``.
            position: Positions within the document, however large, ``(batch, entries)`` float64.
            memo: Cache shared by layers for values that depend only on positions.
        """
        return x

    def apply_relative(self, keys: Tensor, distance: Tensor) -> Tensor:
        """Return keys as queries without positions see them (see :class:`memtx.memory.base.ContentAttention`)."""
        return keys

    def score_bias(self, offset: Tensor, memo: Memoize) -> AlibiBias | None:
        """Return the bias of one query's scores, given the offsets of the keys from it, ``(batch, keys)`` float64."""
        return None


class NoPositions(Positions):
    """Scores by content alone, for models whose embeddings contain positions."""

    def forward(
        self, q: Tensor, k: Tensor, entry_positions: EntryPositions, segment: Segment
    ) -> tuple[Tensor, Tensor, AlibiBias | None]:
        """Return both unchanged."""
        return q, k, None
