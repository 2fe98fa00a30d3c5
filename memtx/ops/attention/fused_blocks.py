"""Random blocks through the CPU's fused kernel: every block of queries is a row of its own, with gathered keys.

Nothing of the size of the scores is kept: the mask has one line for all queries of a block wherever no document
begins or ends within one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.ops.attention import fused
from memtx.ops.attention.pattern import distinct
from memtx.ops.attention.plan import Band
from memtx.ops.visibility import Visibility


def random_blocks(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp, with gradient, as :func:`memtx.ops.attention.pattern.random_blocks` does."""
    pattern = visibility.pattern
    assert pattern is not None
    assert pattern.blocks is not None
    rows, heads, queries, width = q.shape
    size = pattern.size
    entries = max(-(-(k.shape[2] - pattern.first) // size), 1)  # blocks of keys
    table = pattern.blocks if pattern.repeats else distinct(pattern.blocks)
    table = table.expand(heads, -1, -1).transpose(0, 1)  # (query blocks, heads, r)
    asking, _, count = table.shape

    def of_queries(x: Tensor) -> Tensor:
        """(rows, heads, queries, width) -> (rows * query blocks, heads, size, width)."""
        x = F.pad(x.transpose(1, 2), (0, 0, 0, 0, 0, asking * size - queries))
        return x.reshape(rows * asking, size, heads, -1).transpose(1, 2)

    chosen = (table >= 0) & (table < entries)
    # Of all blocks of all rows and heads laid end to end; selected by one index, whose gradient is one index_add.
    shared = k.shape[1]
    head = torch.arange(heads, device=q.device)[:, None] * shared // heads
    at = table.clamp(0, entries - 1) * shared + head  # (query blocks, heads, r)
    at = (torch.arange(rows, device=q.device)[:, None, None, None] * entries * shared + at).flatten()

    def of_keys(x: Tensor) -> Tensor:
        """(rows, kv_heads, keys, width) -> (rows * query blocks, heads, r * size, width)."""
        x = F.pad(x[:, :, pattern.first :], (0, 0, 0, entries * size - x.shape[2] + pattern.first))
        x = x.view(rows, shared, entries, size, -1).transpose(1, 2).reshape(rows * entries * shared, -1)
        return x.index_select(0, at).view(rows * asking, heads, count * size, -1)

    seen = _seen(visibility, table, entries, chosen).expand(rows, -1, -1, -1, -1).flatten(0, 1)
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    mask = torch.zeros(seen.shape, dtype=kind, device=q.device).masked_fill_(~seen, float("-inf"))
    blind = (~seen.any(-1)).expand(-1, -1, size).transpose(1, 2)
    band = Band(0, size, 0, count * size, mask.expand(-1, -1, size, -1), blind, False)
    out, lse = fused.attend(of_queries(q), of_keys(k), of_keys(v), [band], scale)
    out = out.transpose(1, 2).reshape(rows, asking * size, heads, width)[:, :queries]
    lse = lse.transpose(1, 2).reshape(rows, asking * size, heads)[:, :queries]
    return out.transpose(1, 2), lse.transpose(1, 2)


def _seen(visibility: Visibility, table: Tensor, entries: int, chosen: Tensor) -> Tensor:
    """Return (1 or rows, query blocks, heads, 1 or size, r * size) bool."""
    pattern = visibility.pattern
    assert pattern is not None
    size, first = pattern.size, pattern.first
    index = table.clamp(0, entries - 1)

    def of_lives(x: Tensor) -> Tensor:
        """(1 or rows, keys) -> (1 or rows, query blocks, heads, 1, r * size)."""
        # Padded keys get 0 for both ends of every life, so they are in no document.
        x = F.pad(x[:, first:], (0, entries * size - x.shape[1] + first)).view(x.shape[0], entries, size)
        return x[:, index].flatten(3, 4)[..., None, :]

    begins, ends = pattern.begins, pattern.ends
    open_all = (begins <= 0) & (ends >= visibility.queries)
    tick = torch.arange(table.shape[0] * size, device=table.device).view(-1, 1, size, 1)
    if pattern.repeats and bool((open_all | (ends <= begins)).all()):
        seen = of_lives(open_all.to(torch.int64)) > 0
    else:
        seen = (of_lives(begins) <= tick) & (tick < of_lives(ends))
    if not pattern.repeats:
        seen = seen & ~((of_lives(visibility.born) <= tick) & (tick < of_lives(visibility.expires)))
    return seen & chosen.repeat_interleave(size, dim=-1)[..., None, :]
