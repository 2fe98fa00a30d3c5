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
from memtx.layers.frequencies import Frequencies
from memtx.memory.base import Places
from memtx.ops.attention.bias import Bias
from memtx.ops.rotary import rotate, turned_by
from memtx.segment import Segment

Once = Callable[[Hashable, Callable[[], Any]], Any]


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
    def forward(self, q: Tensor, k: Tensor, places: Places, segment: Segment) -> tuple[Tensor, Tensor, Bias | None]:
        """Return queries, keys and an additive bias of the scores.

        Args:
            q: (rows, segment, heads, head_dim).
            k: (rows, entries, kv_heads, head_dim).
            places: where the entries stand.
            segment: where the queries stand.
        """

    def placed(self, x: Tensor, position: Tensor, once: Once) -> Tensor:
        """Return queries or keys as they are kept for good, one token or entry a row.

        Args:
            x: (rows, 1, heads, head_dim).
            position: (rows, 1) float64, within the document, however far.
            once: shares what is made of positions between layers.
        """
        return x

    def apart(self, keys: Tensor, distance: Tensor) -> Tensor:
        """Return keys as queries without positions see them (see :class:`memtx.memory.base.ContentAttention`)."""
        return keys

    def bias(self, tick: Tensor, once: Once) -> Bias | None:
        """Return the bias of one query's scores; tick: (rows, keys) float64, the query being at 0."""
        return None


class NoPositions(Positions):
    """Scores by content alone, for models whose embeddings say where a token stands."""

    def forward(self, q: Tensor, k: Tensor, places: Places, segment: Segment) -> tuple[Tensor, Tensor, Bias | None]:
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
        frequencies: Callable[[int, float], Frequencies] = Frequencies,
    ) -> None:
        super().__init__(heads, head_dim)
        if head_dim % 2:
            raise MemtxError(f"Rotary positions need an even width of a head, got {head_dim}.", "Change dim or heads.")
        self.base = base
        self.frequencies = frequencies(head_dim, base)

    def extra_repr(self) -> str:
        """Say the base."""
        return f"base={self.base}"

    def _turn(self, tick: Tensor, dtype: torch.dtype) -> Tensor:
        return turned_by(tick, self.frequencies.inverse(tick.device), dtype, self.frequencies.factor)

    def forward(self, q: Tensor, k: Tensor, places: Places, segment: Segment) -> tuple[Tensor, Tensor, Bias | None]:
        """Rotate both by their ticks."""
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        settings = (Rotary, self.frequencies.settings, dtype)

        def of_keys() -> Tensor:
            return self._turn(places.tick, dtype)

        def of_queries() -> Tensor:
            return self._turn(torch.arange(segment.length, device=q.device)[None], dtype)

        q = rotate(q, segment.once(settings, of_queries))
        return q, rotate(k, places.visibility.once(settings, of_keys)), None

    def placed(self, x: Tensor, position: Tensor, once: Once) -> Tensor:
        """Rotate by the position itself: angles are float64, so they stay true however long the stream is."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        key = (Rotary, self.frequencies.settings, dtype, id(position))
        return rotate(x, once(key, lambda: self._turn(position, dtype)))

    def apart(self, keys: Tensor, distance: Tensor) -> Tensor:
        """Rotate back by the distance; a query that is not rotated leaves its factor to the keys."""
        dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
        return rotate(keys, self._turn(-distance[None], dtype) * self.frequencies.factor)


class Alibi(Positions):
    """A penalty linear in distance, steeper from head to head (ALiBi, Press et al. 2022, section 3)."""

    slopes: Tensor

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__(heads, head_dim)
        slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1, dtype=torch.float64) / heads)
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(self, q: Tensor, k: Tensor, places: Places, segment: Segment) -> tuple[Tensor, Tensor, Bias | None]:
        """Leave both; the bias is shared by all layers of equal places."""
        return q, k, places.visibility.once((Alibi, self.heads), lambda: Bias(self.slopes, places.tick))

    def bias(self, tick: Tensor, once: Once) -> Bias | None:
        """Return the penalty."""
        made: Bias = once((Alibi, self.heads, id(tick)), lambda: Bias(self.slopes, tick))
        return made
