"""Random blocks of a pattern laid out for the CPU's fused kernel: every block of queries is a row of its own.

Its keys are gathered before the kernel and let go after it, forward and backward, and the mask has one line for all
queries of a block wherever no document begins or ends within one: nothing of the size of the scores is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.ops.attention.pattern import blocks_of
from memtx.ops.visibility import Visibility


@dataclass(frozen=True)
class Gathered:
    """Which keys each block of queries gathers.

    Attributes:
        size: queries, and keys, a block.
        first: the key at which block 0 of the keys begins.
        asking: blocks of queries a row.
        entries: blocks of keys a row.
        at: (rows * asking * heads * r,) int64, blocks of keys among those of all rows and key heads.
        mask: (rows * asking, heads, size, r * size), the additive mask; lines of a block may be one.
        blind: (rows * asking, size, heads) bool, queries that see none of the keys.
    """

    size: int
    first: int
    asking: int
    entries: int
    at: Tensor
    mask: Tensor
    blind: Tensor

    def of_queries(self, x: Tensor) -> Tensor:
        """(rows, heads, queries, width) -> (rows * asking, heads, size, width), zeros after the last query."""
        rows, heads, queries, width = x.shape
        x = F.pad(x.transpose(1, 2), (0, 0, 0, 0, 0, self.asking * self.size - queries))
        return x.reshape(rows * self.asking, self.size, heads, width).transpose(1, 2)

    def in_order(self, x: Tensor, queries: int) -> Tensor:
        """(rows * asking, size, heads, ...) -> (rows, queries, heads, ...)."""
        return x.reshape(-1, self.asking * self.size, *x.shape[2:])[:, :queries]

    def of_keys(self, x: Tensor) -> Tensor:
        """(rows, kv_heads, keys, width) -> (rows * asking, heads, r * size, width)."""
        rows, shared, keys, width = x.shape
        x = F.pad(x[:, :, self.first :], (0, 0, 0, self.entries * self.size - keys + self.first))
        x = x.view(rows, shared, self.entries, self.size, width).transpose(1, 2).reshape(-1, self.size * width)
        return x.index_select(0, self.at).view(*self.mask.shape[:2], -1, width)

    def add_to_keys(self, total: Tensor, x: Tensor) -> None:
        """Add x, shaped as :meth:`of_keys` gives it, to the keys it was gathered from.

        Args:
            total: (rows, kv_heads, keys, width), added to in place.
            x: (rows * asking, heads, r * size, width).
        """
        rows, shared, keys, width = total.shape
        summed = x.new_zeros(rows * self.entries * shared, self.size * width)
        summed.index_add_(0, self.at, x.reshape(-1, self.size * width))
        summed = summed.view(rows, self.entries, shared, self.size, width).transpose(1, 2).flatten(2, 3)
        total[:, :, self.first :] += summed[:, :, : keys - self.first]


def gather(visibility: Visibility, rows: int, heads: int, shared: int, dtype: torch.dtype) -> Gathered:
    """Return the layout of a visibility's random blocks.

    Args:
        visibility: with a pattern that has blocks.
        rows: texts.
        heads: of queries.
        shared: heads of keys.
        dtype: of the mask.
    """
    pattern, blocks = visibility.pattern, blocks_of(visibility)
    assert pattern is not None
    size, entries = pattern.size, blocks.entries
    table = blocks.table.expand(heads, -1, -1).transpose(0, 1)  # (asking, heads, r)
    head = torch.arange(heads, device=table.device)[:, None] * shared // heads
    row = torch.arange(rows, device=table.device)[:, None, None, None]
    seen = blocks.seen.transpose(1, 2).expand(rows, -1, heads, -1, -1).flatten(0, 1)
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
    return Gathered(
        size,
        pattern.first,
        table.shape[0],
        entries,
        (row * entries * shared + table * shared + head).flatten(),
        mask.expand(-1, -1, size, -1),
        (~seen.any(-1)).expand(-1, -1, size).transpose(1, 2),
    )
