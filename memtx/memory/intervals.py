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
from memtx.ops.attention.reference import softmax_attention
from memtx.segment import Segment


def split_into_chunks(x: Tensor, num_chunks: int, chunk_length: int, fill: int) -> Tensor:
    """Cut (rows, segment) into (rows, stretches, ticks); ticks behind the last token get ``fill``."""
    return F.pad(x, (0, num_chunks * chunk_length - x.shape[1]), value=fill).view(-1, num_chunks, chunk_length)


def attend_by_chunk(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Readout:
    """Attend from a layer's queries to the entries of their own stretch.

    Args:
        q: (rows, segment, heads, head_dim).
        k: (rows, stretches, heads, entries, head_dim).
        v: likewise.
        mask: (rows, stretches, 1, ticks, entries) bool.
    """
    n, stretches, ticks = q.shape[1], mask.shape[1], mask.shape[3]
    asked = F.pad(q, (0, 0, 0, 0, 0, stretches * ticks - n))
    asked = rearrange(asked, "r (b t) h d -> r b h t d", b=stretches)
    out, lse = softmax_attention((asked @ k.mT) * q.shape[-1] ** -0.5, mask, v)
    out, lse = rearrange(out, "r b h t d -> r h (b t) d"), rearrange(lse, "r b h t -> r h (b t)")
    return Readout(out[:, :, :n], lse=lse[:, :, :n])


@dataclass(frozen=True)
class IntervalPlan:
    """The intervals that may end in a call, one a stretch of ``interval`` ticks; shared by layers of equal settings.

    Attributes:
        input_indices: (rows * stretches * ticks,) int64, where their inputs stand in the segment, rows flattened.
        input_mask: (rows, stretches, 1, 1, ticks) bool, which of these are the interval's.
        first_continues: (rows,) bool, whether the first one began before the call.
        is_first: (rows, stretches) bool, which are their document's first, so that they find the initial slots.
        has_end: (rows, stretches) bool, which end in the call at all.
        version_mask: (rows, stretches, 1, ticks, 3) bool, which version a query meets: initial, found, written.
        final_version: (rows,) int64, which of [found | written in each stretch] is the next state.
        is_unwritten: (rows,) bool, whether there is none.
        open_mask: (rows, 1, 1, ticks) bool, which of the last tokens are of the interval open at the end.
        open_continues: (rows,) bool, whether that one began before the call.
        open_is_empty: (rows,) bool, whether it has no token yet.
    """

    input_indices: Tensor
    input_mask: Tensor
    first_continues: Tensor
    is_first: Tensor
    has_end: Tensor
    version_mask: Tensor
    final_version: Tensor
    is_unwritten: Tensor
    open_mask: Tensor
    open_continues: Tensor
    open_is_empty: Tensor

    @classmethod
    def from_segment(cls, segment: Segment, interval: int) -> IntervalPlan:
        """Place the intervals of ``interval`` tokens in a call."""
        n, position = segment.length, segment.position
        rows, stretches = position.shape[0], -(-n // interval)
        ticks = min(interval, n)
        device = position.device
        tick = torch.arange(n, device=device)
        offset = torch.arange(ticks, device=device)

        cut = partial(split_into_chunks, num_chunks=stretches, chunk_length=ticks)
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
