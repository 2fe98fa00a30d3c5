"""How a score learns the distance between query and key: rotary embedding, or a linear bias.

Both are relative, and both are computed from ticks, which count from the call's first token: small numbers
however long the stream is. A compressed entry stands at its block's centre.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from memtx.errors import MemtxError
from memtx.layers.positions.rope_scaling import RotaryFrequencies
from memtx.memory.base import EntryPositions
from memtx.ops.attention.bias import AlibiBias
from memtx.ops.rotary import apply_rotary_emb, rotary_angles
from memtx.segment import Segment

Memoize = Callable[[Hashable, Callable[[], Any]], Any]


class Positions(nn.Module, ABC):
    """What a layer does with places.

    Args:
        heads: query heads.
        head_dim: width of a head.
    """

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim

    @abstractmethod
    def forward(
        self, q: Tensor, k: Tensor, entry_positions: EntryPositions, segment: Segment
    ) -> tuple[Tensor, Tensor, AlibiBias | None]:
        """Return queries, keys and an additive bias of the scores.

        Args:
            q: (rows, segment, heads, head_dim).
            k: (rows, entries, kv_heads, head_dim).
            entry_positions: where the entries stand.
            segment: where the queries stand.
        """

    def apply_absolute(self, x: Tensor, position: Tensor, memo: Memoize) -> Tensor:
        """Return queries or keys as they are kept for good, one token or entry a row.

        Args:
            x: (rows, 1, heads, head_dim).
            position: (rows, 1) float64, within the document, however far.
            memo: shares what is made of positions between layers.
        """
        return x

    def apply_relative(self, keys: Tensor, distance: Tensor) -> Tensor:
        """Return keys as queries without positions see them (see :class:`memtx.memory.base.ContentAttention`)."""
        return keys

    def score_bias(self, offset: Tensor, memo: Memoize) -> AlibiBias | None:
        """Return the bias of one query's scores; offset: (rows, keys) float64, the query being at 0."""
        return None


class NoPositions(Positions):
    """Scores by content alone, for models whose embeddings say where a token stands."""

    def forward(
        self, q: Tensor, k: Tensor, entry_positions: EntryPositions, segment: Segment
    ) -> tuple[Tensor, Tensor, AlibiBias | None]:
        """Leave both."""
        return q, k, None


class Rotary(Positions):
    """Rotary embedding (RoFormer, Su et al. 2021, section 3.2).

    Args:
        heads: query heads.
        head_dim: width of a head, even.
        base: the slowest rotation's period is about 2 pi times this.
        frequencies: makes how fast the pairs turn from (head_dim, base).

    Raises:
        MemtxError: the width of a head is odd.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        base: float = 10000.0,
        frequencies: Callable[[int, float], RotaryFrequencies] = RotaryFrequencies,
    ) -> None:
        super().__init__(heads, head_dim)
        if head_dim % 2:
            raise MemtxError(f"Rotary positions need an even width of a head, got {head_dim}.", "Change dim or heads.")
        self.base = base
        self.frequencies = frequencies(head_dim, base)

    def extra_repr(self) -> str:
        """Say the base."""
        return f"base={self.base}"

    def _angles(self, offset: Tensor, dtype: torch.dtype) -> Tensor:
        return rotary_angles(offset, self.frequencies.inv_freq(offset.device), dtype, self.frequencies.attention_factor)

    def forward(
        self, q: Tensor, k: Tensor, entry_positions: EntryPositions, segment: Segment
    ) -> tuple[Tensor, Tensor, AlibiBias | None]:
        """Rotate both by their ticks."""
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        settings = (Rotary, self.frequencies.cache_key, dtype)

        def of_keys() -> Tensor:
            return self._angles(entry_positions.offset, dtype)

        def of_queries() -> Tensor:
            return self._angles(torch.arange(segment.length, device=q.device)[None], dtype)

        q = apply_rotary_emb(q, segment.memo(settings, of_queries))
        return q, apply_rotary_emb(k, entry_positions.visibility.memo(settings, of_keys)), None

    def apply_absolute(self, x: Tensor, position: Tensor, memo: Memoize) -> Tensor:
        """Rotate by the position itself: angles are float64, so they stay true however long the stream is."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        key = (Rotary, self.frequencies.cache_key, dtype, id(position))
        return apply_rotary_emb(x, memo(key, lambda: self._angles(position, dtype)))

    def apply_relative(self, keys: Tensor, distance: Tensor) -> Tensor:
        """Rotate back by the distance; a query that is not rotated leaves its factor to the keys."""
        dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
        return apply_rotary_emb(keys, self._angles(-distance[None], dtype) * self.frequencies.attention_factor)


class Alibi(Positions):
    """A penalty linear in distance, steeper from head to head (ALiBi, Press et al. 2022, section 3)."""

    slopes: Tensor

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__(heads, head_dim)
        slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1, dtype=torch.float64) / heads)
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(
        self, q: Tensor, k: Tensor, entry_positions: EntryPositions, segment: Segment
    ) -> tuple[Tensor, Tensor, AlibiBias | None]:
        """Leave both; the bias is shared by all layers of equal places."""
        return (
            q,
            k,
            entry_positions.visibility.memo(
                (Alibi, self.heads), lambda: AlibiBias(self.slopes, entry_positions.offset)
            ),
        )

    def score_bias(self, offset: Tensor, memo: Memoize) -> AlibiBias | None:
        """Return the penalty."""
        made: AlibiBias = memo((Alibi, self.heads, id(offset)), lambda: AlibiBias(self.slopes, offset))
        return made
