"""Where the intervals of a document end within a call, for memories that write once an interval of tokens.

An interval is counted from the document's beginning, and documents begin anywhere, so every row has its own ends. In
any ``interval`` ticks of a row at most one interval ends, so a call of n tokens has room for ceil(n / interval)
versions of what is written, and the queries of one stretch of ``interval`` ticks meet three: the version that the
stretch found, the one written in it, and the initial one where a document is younger than an interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from memtx.memory.base import Readout
from memtx.ops.attention.reference import weigh
from memtx.segment import Segment


def by_stretch(x: Tensor, stretches: int, ticks: int, fill: int) -> Tensor:
    """Cut (rows, segment) into (rows, stretches, ticks); ticks behind the last token get ``fill``."""
    return F.pad(x, (0, stretches * ticks - x.shape[1]), value=fill).view(-1, stretches, ticks)


def recalled(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Readout:
    """Attend from a layer's queries to the entries of their own stretch.

    Args:
        q: (rows, segment, heads, head_dim).
        k: (rows, stretches, heads, entries, head_dim).
        v: likewise.
        seen: (rows, stretches, 1, ticks, entries) bool.
    """
    n, stretches, ticks = q.shape[1], seen.shape[1], seen.shape[3]
    asked = F.pad(q, (0, 0, 0, 0, 0, stretches * ticks - n))
    asked = rearrange(asked, "r (b t) h d -> r b h t d", b=stretches)
    out, lse = weigh((asked @ k.mT) * q.shape[-1] ** -0.5, seen, v)
    out, lse = rearrange(out, "r b h t d -> r h (b t) d"), rearrange(lse, "r b h t -> r h (b t)")
    return Readout(out[:, :, :n], lse=lse[:, :, :n])


@dataclass(frozen=True)
class Intervals:
    """The intervals that may end in a call, one a stretch of ``interval`` ticks; shared by layers of equal settings.

    Attributes:
        source: (rows * stretches * ticks,) int64, where their inputs stand in the segment, rows flattened.
        inside: (rows, stretches, 1, 1, ticks) bool, which of these are the interval's.
        begun: (rows,) bool, whether the first one began before the call.
        first: (rows, stretches) bool, which are their document's first, so that they find the initial slots.
        ends: (rows, stretches) bool, which end in the call at all.
        seen: (rows, stretches, 1, ticks, 3) bool, which version a query meets: initial, found, written.
        last: (rows,) int64, which of [found | written in each stretch] is the next state.
        fresh: (rows,) bool, whether there is none.
        open: (rows, 1, 1, ticks) bool, which of the last tokens are of the interval open at the end.
        still: (rows,) bool, whether that one began before the call.
        empty: (rows,) bool, whether it has no token yet.
    """

    source: Tensor
    inside: Tensor
    begun: Tensor
    first: Tensor
    ends: Tensor
    seen: Tensor
    last: Tensor
    fresh: Tensor
    open: Tensor
    still: Tensor
    empty: Tensor

    @classmethod
    def of(cls, segment: Segment, interval: int) -> Intervals:
        """Place the intervals of ``interval`` tokens in a call."""
        n, position = segment.length, segment.position
        rows, stretches = position.shape[0], -(-n // interval)
        ticks = min(interval, n)
        device = position.device
        tick = torch.arange(n, device=device)
        offset = torch.arange(ticks, device=device)

        cut = partial(by_stretch, stretches=stretches, ticks=ticks)
        ending = cut(((position + 1) % interval == 0).int(), fill=0)
        at = ending.argmax(-1) + torch.arange(stretches, device=device) * ticks
        at = at.clamp(max=n - 1)
        # The interval that ends at tick i began at tick i - interval + 1.
        where = at[..., None] - ticks + 1 + offset
        source = torch.arange(rows, device=device)[:, None, None] * n + where.clamp(min=0)
        # The version a query meets was written at the tick before its own interval began.
        written = cut(tick - position % interval - 1, fill=-1)
        young = cut((position < interval).int(), fill=0).bool()
        begin = torch.arange(stretches, device=device)[:, None] * ticks
        own = ~young & (written >= begin)
        seen = torch.stack([young, ~young & ~own, own], dim=-1)[:, :, None]
        waiting = segment.next_position % interval
        newest_written = n - waiting - 1
        last = torch.where(newest_written < 0, 0, newest_written.clamp(min=0) // interval + 1)
        return cls(
            source.flatten(),
            (where >= 0)[:, :, None, None],
            at[:, 0] < interval - 1,
            position.gather(1, at) < interval,
            ending.any(-1),
            seen,
            last,
            segment.next_position < interval,
            (ticks - offset <= waiting[:, None])[:, None, None],
            waiting > n,
            waiting == 0,
        )
