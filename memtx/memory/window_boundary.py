"""The edge between exact states and compressed entries, and the blocks that cross it within a call.

edge(t) = rate * max(0, floor((t - window + 1) / rate)). Shapes are fixed: of any ``compression_rate`` ticks of a row at
most one gives birth to a block, so a segment of n tokens has room for ceil(n / rate) of them; the surplus is born
expired.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.memory.recurrent import locate_entries
from memtx.segment import INFINITE_OFFSET, Segment


@dataclass(frozen=True)
class EvictedBlocks:
    """What crosses in a call; shared by all layers of equal settings.

    Attributes:
        block_indices: (rows * blocks * compression_rate,) int64, where the states of the blocks stand in the cache, or
            in [cache | segment] where the segment is longer than the window; rows flattened.
        recent_indices: likewise in [cache | segment] the newest states as each block crosses.
        valid: (rows, blocks) bool, which really cross in this call.
        evicted_at: (rows, blocks) int64, the tick at which each crosses.
        document_end: (rows, blocks) int64, the tick at which its document ends.
        document_id: (rows, blocks) int64, which document of the call it is of, 0 for the carried one.
        exact_offset: (rows, cache + segment) int64, where the exact states of [cache | segment] stand.
        exact_evicted_at: likewise, the tick at which each crosses the edge in a block; negative for one before its
            document.
        exact_document_end: likewise, the tick at which its document ends.
    """

    block_indices: Tensor
    recent_indices: Tensor
    valid: Tensor
    evicted_at: Tensor
    document_end: Tensor
    document_id: Tensor
    exact_offset: Tensor
    exact_evicted_at: Tensor
    exact_document_end: Tensor

    @classmethod
    def from_segment(cls, segment: Segment, window: int, compression_rate: int) -> EvictedBlocks:
        """Place a call's blocks; the cache holds the ``window + compression_rate - 1`` newest states."""
        cached, n = window + compression_rate - 1, segment.length
        rows, device = segment.position.shape[0], segment.position.device
        tick, position, exact_end = locate_entries(segment, cached)
        leaves = tick - position + compression_rate * (position // compression_rate + 1) + window - 1
        # In any `compression_rate` ticks of a row at most one block crosses.
        count = -(-n // compression_rate)
        age = segment.position - window + 1
        crosses = F.pad(
            (age >= compression_rate) & (age % compression_rate == 0), (0, count * compression_rate - n)
        ).view(rows, count, compression_rate)
        at = crosses.int().argmax(-1) + torch.arange(count, device=device) * compression_rate
        at = at.clamp(max=n - 1)
        # A block whose last state leaves the window at tick i began at tick i - cached: place i of the cache.
        offset = torch.arange(compression_rate, device=device)
        row = torch.arange(rows, device=device)[:, None, None]
        of_source = row * (cached if n <= window else cached + n)
        return cls(
            (of_source + at[..., None] + offset).flatten(),
            (row * (cached + n) + at[..., None] + cached - compression_rate + 1 + offset).flatten(),
            crosses.any(-1),
            at,
            segment.document_end.gather(1, at),
            segment.document_id.gather(1, at),
            tick,
            torch.where(position >= 0, leaves, -INFINITE_OFFSET),
            exact_end,
        )
