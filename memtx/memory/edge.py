"""The edge between exact states and compressed entries, and the blocks that cross it within a call.

edge(t) = rate * max(0, floor((t - window + 1) / rate)). Shapes are fixed: of any ``rate`` ticks of a row at most one
gives birth to a block, so a segment of n tokens has room for ceil(n / rate) of them; the surplus is born expired.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.memory.recurrent import cached_places
from memtx.segment import FAR, Segment


@dataclass(frozen=True)
class Edge:
    """What crosses in a call; shared by all layers of equal settings.

    Attributes:
        source: (rows * blocks * rate,) int64, where the states of the blocks stand in the cache, or in [cache |
            segment] where the segment is longer than the window; rows flattened.
        probe: likewise in [cache | segment] the newest states as each block crosses.
        born: (rows, blocks) bool, which really cross in this call.
        at: (rows, blocks) int64, the tick at which each crosses.
        end: (rows, blocks) int64, the tick at which its document ends.
        document: (rows, blocks) int64, which document of the call it is of, 0 for the carried one.
        tick: (rows, places + segment) int64, where the exact states of [cache | segment] stand.
        leaves: likewise, the tick at which each crosses the edge in a block; negative for one before its document.
        exact_end: likewise, the tick at which its document ends.
    """

    source: Tensor
    probe: Tensor
    born: Tensor
    at: Tensor
    end: Tensor
    document: Tensor
    tick: Tensor
    leaves: Tensor
    exact_end: Tensor

    @classmethod
    def of(cls, segment: Segment, window: int, rate: int) -> Edge:
        """Place a call's blocks; the cache holds the ``window + rate - 1`` newest states."""
        cached, n = window + rate - 1, segment.length
        rows, device = segment.position.shape[0], segment.position.device
        tick, position, exact_end = cached_places(segment, cached)
        leaves = tick - position + rate * (position // rate + 1) + window - 1
        # In any `rate` ticks of a row at most one block crosses.
        count = -(-n // rate)
        age = segment.position - window + 1
        crosses = F.pad((age >= rate) & (age % rate == 0), (0, count * rate - n)).view(rows, count, rate)
        at = crosses.int().argmax(-1) + torch.arange(count, device=device) * rate
        at = at.clamp(max=n - 1)
        # A block whose last state leaves the window at tick i began at tick i - cached: place i of the cache.
        offset = torch.arange(rate, device=device)
        row = torch.arange(rows, device=device)[:, None, None]
        of_source = row * (cached if n <= window else cached + n)
        return cls(
            (of_source + at[..., None] + offset).flatten(),
            (row * (cached + n) + at[..., None] + cached - rate + 1 + offset).flatten(),
            crosses.any(-1),
            at,
            segment.end.gather(1, at),
            segment.document.gather(1, at),
            tick,
            torch.where(position >= 0, leaves, -FAR),
            exact_end,
        )
