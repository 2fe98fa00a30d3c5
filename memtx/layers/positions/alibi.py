"""ALiBi: a bias of the scores that is linear in the distance."""

from __future__ import annotations

import torch
from torch import Tensor

from memtx.layers.positions.base import Memoize, Positions
from memtx.memory.base import EntryPositions
from memtx.ops.attention.bias import AlibiBias
from memtx.segment import Segment


class Alibi(Positions):
    """A penalty linear in distance, with a different slope per head (ALiBi, Press et al. 2022, section 3)."""

    slopes: Tensor

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__(heads, head_dim)
        slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1, dtype=torch.float64) / heads)
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(
        self, q: Tensor, k: Tensor, entry_positions: EntryPositions, segment: Segment
    ) -> tuple[Tensor, Tensor, AlibiBias | None]:
        """Return both unchanged, and the bias."""
        bias = entry_positions.visibility.memo(
            (Alibi, self.heads), lambda: AlibiBias(self.slopes, entry_positions.offset)
        )
        return q, k, bias

    def score_bias(self, offset: Tensor, memo: Memoize) -> AlibiBias | None:
        """Return the bias of one query's scores."""
        bias: AlibiBias = memo((Alibi, self.heads, id(offset)), lambda: AlibiBias(self.slopes, offset))
        return bias
