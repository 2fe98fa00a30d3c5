"""Random blocks of a pattern laid out for the CPU's fused kernel: every block of queries is a row of its own.

Its keys are gathered before the kernel and let go after it, forward and backward, and the mask has one line for all
queries of a block wherever no document begins or ends within one: nothing of the size of the scores is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.ops.attention.mask import Visibility
from memtx.ops.attention.sparse import find_key_blocks


@dataclass(frozen=True)
class GatheredBlocks:
    """Which keys each block of queries gathers.

    Attributes:
        block_size: queries, and keys, a block.
        first_key: the key at which block 0 of the keys begins.
        num_query_blocks: blocks of queries a row.
        num_key_blocks: blocks of keys a row.
        indices: (rows * num_query_blocks * heads * r,) int64, blocks of keys among those of all rows and key heads.
        mask: (rows * num_query_blocks, heads, size, r * size), the additive mask; lines of a block may be one.
        fully_masked: (rows * num_query_blocks, size, heads) bool, queries that see none of the keys.
    """

    block_size: int
    first_key: int
    num_query_blocks: int
    num_key_blocks: int
    indices: Tensor
    mask: Tensor
    fully_masked: Tensor

    def split_queries(self, x: Tensor) -> Tensor:
        """(rows, heads, queries, width) -> (rows * num_query_blocks, heads, size, width), zeros after the last one."""
        rows, heads, queries, width = x.shape
        x = F.pad(x.transpose(1, 2), (0, 0, 0, 0, 0, self.num_query_blocks * self.block_size - queries))
        return x.reshape(rows * self.num_query_blocks, self.block_size, heads, width).transpose(1, 2)

    def join_queries(self, x: Tensor, num_queries: int) -> Tensor:
        """(rows * num_query_blocks, size, heads, ...) -> (rows, queries, heads, ...)."""
        return x.reshape(-1, self.num_query_blocks * self.block_size, *x.shape[2:])[:, :num_queries]

    def gather_keys(self, x: Tensor) -> Tensor:
        """(rows, kv_heads, keys, width) -> (rows * num_query_blocks, heads, r * size, width)."""
        rows, shared, keys, width = x.shape
        x = F.pad(x[:, :, self.first_key :], (0, 0, 0, self.num_key_blocks * self.block_size - keys + self.first_key))
        x = (
            x.view(rows, shared, self.num_key_blocks, self.block_size, width)
            .transpose(1, 2)
            .reshape(-1, self.block_size * width)
        )
        return x.index_select(0, self.indices).view(*self.mask.shape[:2], -1, width)

    def scatter_add_keys(self, grad_keys: Tensor, x: Tensor) -> None:
        """Add x, shaped as :meth:`gather_keys` gives it, to the keys it was gathered from.

        Args:
            grad_keys: (rows, kv_heads, keys, width), added to in place.
            x: (rows * num_query_blocks, heads, r * size, width).
        """
        rows, shared, keys, width = grad_keys.shape
        summed = x.new_zeros(rows * self.num_key_blocks * shared, self.block_size * width)
        summed.index_add_(0, self.indices, x.reshape(-1, self.block_size * width))
        summed = summed.view(rows, self.num_key_blocks, shared, self.block_size, width).transpose(1, 2).flatten(2, 3)
        grad_keys[:, :, self.first_key :] += summed[:, :, : keys - self.first_key]


def gather_random_blocks(
    visibility: Visibility, batch_size: int, heads: int, kv_heads: int, dtype: torch.dtype
) -> GatheredBlocks:
    """Return the layout of a visibility's random blocks.

    Args:
        visibility: with a pattern that has blocks.
        batch_size: texts.
        heads: of queries.
        kv_heads: heads of keys.
        dtype: of the mask.
    """
    pattern, blocks = visibility.pattern, find_key_blocks(visibility)
    assert pattern is not None
    size, entries = pattern.block_size, blocks.num_key_blocks
    table = blocks.table.expand(heads, -1, -1).transpose(0, 1)  # (num_query_blocks, heads, r)
    head = torch.arange(heads, device=table.device)[:, None] * kv_heads // heads
    row = torch.arange(batch_size, device=table.device)[:, None, None, None]
    seen = blocks.mask.transpose(1, 2).expand(batch_size, -1, heads, -1, -1).flatten(0, 1)
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
    return GatheredBlocks(
        size,
        pattern.first_key,
        table.shape[0],
        entries,
        (row * entries * kv_heads + table * kv_heads + head).flatten(),
        mask.expand(-1, -1, size, -1),
        (~seen.any(-1)).expand(-1, -1, size).transpose(1, 2),
    )
