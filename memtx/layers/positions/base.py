"""The interface of position encodings, and the two without angles: none and ALiBi.

All are relative and computed from offsets, which count from the call's first token and so stay small however long the
stream is. A compressed entry is at the center of its block, except for ``RelativePositions``, which counts it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memtx.memory.base import EntryPositions, Memory
from memtx.memory.kv_ring import DecodePlan
from memtx.ops.attention.bias import AlibiBias, ScoreBias
from memtx.segment import Segment

Memoize = Callable[[Hashable, Callable[[], Any]], Any]
"""A function that returns the value of a key, computed on its first use (see :meth:`memtx.memo.Memo.memo`)."""


class Positions(nn.Module):
    """A layer's position encoding.

    Args:
        heads: Number of query heads.
        head_dim: Width of a head.

    Attributes:
        is_rotation: If True, :meth:`rotation` is all that it does, so that a kernel may do it.
    """

    is_rotation: ClassVar[bool] = False

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim

    def forward(
        self, q: Tensor, k: Tensor, entry_positions: EntryPositions, segment: Segment
    ) -> tuple[Tensor, Tensor, ScoreBias | None]:
        """Return queries and keys with positions, and an additive bias of their scores.

        Queries are ``(batch, length, heads, head_dim)``, keys ``(batch, entries, kv_heads, head_dim)``.
        """
        query_offset = segment.memo("query offset", lambda: torch.arange(segment.length, device=q.device)[None])
        offset, memo = entry_positions.offset, entry_positions.visibility.memo
        q, k = self.apply_absolute(q, query_offset, segment.memo), self.apply_absolute(k, offset, memo)
        return q, k, self.score_bias(offset, memo)

    def step(self, q: Tensor, position: Tensor, plan: DecodePlan, memo: Memoize) -> tuple[Tensor, ScoreBias | None]:
        """Return the query of one token per stream with its position, and the bias of its scores.

        Args:
            q: ``(batch, 1, heads, head_dim)``.
            position: ``(batch, 1)`` float64.
            plan: Slots that the token sees, whose keys have positions.
            memo: Cache of values computed from ``position``.
        """
        return self.apply_absolute(q, position, memo), self.score_bias(plan.offset, plan.visibility.memo)

    def check_memories(self, *memories: Memory[Any]) -> None:
        """Raise MemtxError if a memory of the layer cannot be used with these positions."""

    def reset_parameters(self, std: float) -> None:
        """Initialize the weights, if any, with a standard deviation."""

    def apply_absolute(self, x: Tensor, position: Tensor, memo: Memoize) -> Tensor:
        """Return queries or keys ``(batch, n, heads, head_dim)`` in a form whose products depend on distances alone.

        Args:
            x: Queries or keys without positions.
            position: Positions, or offsets from any common origin, however large, ``(batch or 1, n)``.
            memo: Cache, shared by layers, of values computed from this ``position``.
        """
        return x

    def rotation(self, position: Tensor, memo: Memoize) -> Tensor | None:
        """Return the cosines and sines of :meth:`apply_absolute`, ``(batch, n, 1, head_dim / 2, 2)``; None for none."""
        return None

    def apply_relative(self, keys: Tensor, distance: Tensor) -> Tensor:
        """Return keys as queries without positions see them (see :class:`memtx.memory.base.ContentAttention`)."""
        return keys

    def score_bias(self, offset: Tensor, memo: Memoize) -> AlibiBias | None:
        """Return the bias of scores, given the offsets of the keys, ``(batch or 1, keys)`` float64, and their cache."""
        return None


class NoPositions(Positions):
    """Scores by content alone, for models whose embeddings contain positions."""

    is_rotation = True


class Alibi(Positions):
    """A penalty linear in distance, with a different slope per head (ALiBi, Press et al. 2022, section 3)."""

    slopes: Tensor

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__(heads, head_dim)
        slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1, dtype=torch.float64) / heads)
        self.register_buffer("slopes", slopes, persistent=False)

    def score_bias(self, offset: Tensor, memo: Memoize) -> AlibiBias | None:
        """Return the penalties."""
        bias: AlibiBias = memo((Alibi, self.heads), lambda: AlibiBias(self.slopes, offset))
        return bias
