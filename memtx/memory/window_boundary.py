"""The end of the exact window and the blocks that cross it within a call.

The oldest exact position for the query at t is rate * max(0, floor((t - window + 1) / rate)). Shapes are static: of any
``compression_rate`` consecutive tokens at most one evicts a block, so a call of n tokens has room for ceil(n / rate)
blocks; unused ones are never visible.
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
    """The blocks evicted from the window in a call; shared by all layers of equal settings.

    Attributes:
        block_indices: Indices of the blocks' states in the cache, or in [cache | segment] if the segment is longer than
            the window, over the flattened batch, (batch * blocks * compression_rate,) int64.
        recent_indices: Indices in [cache | segment] of the newest states when each block is evicted, in the same form.
        valid: Blocks that are evicted in this call, ``(batch, blocks)`` bool.
        evicted_at: Offset at which each block is evicted, ``(batch, blocks)`` int64.
        document_end: Offset at which its document ends, ``(batch, blocks)`` int64.
        document_id: Its document within the call, ``(batch, blocks)`` int64; 0 is the one open before the call.
        exact_offset: Offsets of the exact states of [cache | segment], ``(batch, cache + length)`` int64.
        exact_evicted_at: Offset at which each exact state's block is evicted; negative before its document.
        exact_document_end: Offset at which each exact state's document ends.
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
        """Locate a call's blocks; the cache holds the newest ``window + compression_rate - 1`` states."""
        rate, cache_length, length = compression_rate, window + compression_rate - 1, segment.length
        batch_size, device = segment.position.shape[0], segment.position.device
        exact_offset, position, exact_document_end = locate_entries(segment, cache_length)
        exact_evicted_at = exact_offset - position + rate * (position // rate + 1) + window - 1
        num_blocks = -(-length // rate)
        age = segment.position - window + 1
        evicts = F.pad((age >= rate) & (age % rate == 0), (0, num_blocks * rate - length))
        evicts = evicts.view(batch_size, num_blocks, rate)
        evicted_at = evicts.int().argmax(-1) + torch.arange(num_blocks, device=device) * rate
        evicted_at = evicted_at.clamp(max=length - 1)
        # A block whose last state leaves the window at offset i starts at offset i - cache_length, cache index i.
        index = evicted_at[..., None] + torch.arange(rate, device=device)
        stream = torch.arange(batch_size, device=device)[:, None, None]
        source_length = cache_length if length <= window else cache_length + length
        return cls(
            block_indices=(stream * source_length + index).flatten(),
            recent_indices=(stream * (cache_length + length) + index + cache_length - rate + 1).flatten(),
            valid=evicts.any(-1),
            evicted_at=evicted_at,
            document_end=segment.document_end.gather(1, evicted_at),
            document_id=segment.document_id.gather(1, evicted_at),
            exact_offset=exact_offset,
            exact_evicted_at=torch.where(position >= 0, exact_evicted_at, -INFINITE_OFFSET),
            exact_document_end=exact_document_end,
        )
