"""Intervals of a document within a call, for memories that write once per interval.

Intervals are counted from the start of the document, so every stream has its own ends; of any ``interval`` consecutive
tokens at most one ends an interval. A call is cut into chunks of ``interval`` tokens with one version of the written
content each. Queries meet the previous version, the chunk's own, and the initial one in a document's first interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from memtx.memory.base import Readout
from memtx.memory.parts import gather_entries
from memtx.ops.attention.reference import softmax_attention
from memtx.segment import Segment


def split_into_chunks(x: Tensor, num_chunks: int, chunk_length: int, fill: int) -> Tensor:
    """Reshape ``(batch, length)`` to ``(batch, chunks, chunk_length)``, padded at the end with ``fill``."""
    return F.pad(x, (0, num_chunks * chunk_length - x.shape[1]), value=fill).view(-1, num_chunks, chunk_length)


def attend_by_chunk(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Readout:
    """Attend from a layer's queries to the entries of their chunk.

    Args:
        q: Queries, ``(batch, length, heads, head_dim)``.
        k: Keys, ``(batch, chunks, heads, entries, head_dim)``.
        v: Values, ``(batch, chunks, heads, entries, head_dim)``.
        mask: True for visible entries, ``(batch, chunks, 1, chunk_length, entries)`` bool.
    """
    length, num_chunks, chunk_length = q.shape[1], mask.shape[1], mask.shape[3]
    q = F.pad(q, (0, 0, 0, 0, 0, num_chunks * chunk_length - length))
    q = rearrange(q, "b (c t) h d -> b c h t d", c=num_chunks)
    out, lse = softmax_attention((q @ k.mT) * q.shape[-1] ** -0.5, mask, v)
    out, lse = rearrange(out, "b c h t d -> b h (c t) d"), rearrange(lse, "b c h t -> b h (c t)")
    return Readout(out[:, :, :length], lse=lse[:, :, :length])


@dataclass(frozen=True)
class IntervalPlan:
    """The intervals that may end in a call, one per chunk; shared by layers of equal settings.

    Attributes:
        input_indices: Indices of each interval's inputs in the segment, over the flattened batch, (batch * chunks *
            chunk_length,) int64.
        input_mask: Inputs that belong to the interval, ``(batch, chunks, 1, 1, chunk_length)`` bool.
        first_continues: Streams whose first interval started before the call, ``(batch,)`` bool.
        is_first: Intervals that are the first of their document and start from the initial content, ``(batch, chunks)``
            bool.
        has_end: Chunks in which an interval ends, ``(batch, chunks)`` bool.
        version_mask: Version that each query sees (initial, previous, written), ``(batch, chunks, 1, chunk_length, 3)``
            bool.
        final_version: Index in [previous | written in each chunk] of the next state, ``(batch,)`` int64.
        is_unwritten: Streams whose document has no finished interval yet, ``(batch,)`` bool.
        open_mask: The last tokens that belong to the interval still open at the end, ``(batch, 1, 1, chunk_length)``
            bool.
        open_continues: Streams whose open interval started before the call, ``(batch,)`` bool.
        open_is_empty: Streams whose open interval has no token yet, ``(batch,)`` bool.
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
        """Locate the intervals of ``interval`` tokens in a call."""
        length, position, device = segment.length, segment.position, segment.position.device
        batch_size, num_chunks, chunk_length = position.shape[0], -(-length // interval), min(interval, length)
        offset = torch.arange(length, device=device)
        index = torch.arange(chunk_length, device=device)
        chunk_start = torch.arange(num_chunks, device=device) * chunk_length
        split = partial(split_into_chunks, num_chunks=num_chunks, chunk_length=chunk_length)

        is_end = split(((position + 1) % interval == 0).int(), fill=0)
        end = (is_end.argmax(-1) + chunk_start).clamp(max=length - 1)
        # An interval that ends at offset i starts at offset i - interval + 1.
        inputs = end[..., None] - chunk_length + 1 + index
        stream_start = torch.arange(batch_size, device=device)[:, None, None] * length
        # A query sees the version written at the offset before its own interval started.
        written_at = split(offset - position % interval - 1, fill=-1)
        sees_initial = split((position < interval).int(), fill=0).bool()
        sees_written = ~sees_initial & (written_at >= chunk_start[:, None])
        versions = torch.stack([sees_initial, ~sees_initial & ~sees_written, sees_written], dim=-1)
        open_length = segment.next_position % interval
        last_written_at = length - open_length - 1
        return cls(
            input_indices=(stream_start + inputs.clamp(min=0)).flatten(),
            input_mask=(inputs >= 0)[:, :, None, None],
            first_continues=end[:, 0] < interval - 1,
            is_first=position.gather(1, end) < interval,
            has_end=is_end.any(-1),
            version_mask=versions[:, :, None],
            final_version=torch.where(last_written_at < 0, 0, last_written_at.clamp(min=0) // interval + 1),
            is_unwritten=segment.next_position < interval,
            open_mask=(chunk_length - index <= open_length[:, None])[:, None, None],
            open_continues=open_length > length,
            open_is_empty=open_length == 0,
        )


@dataclass(frozen=True)
class IntervalRuns:
    """The runs of a call's tokens within one interval of one document, in order; shared by layers of equal settings.

    A memory that is constant within an interval is computed run by run, all streams at once. A write can wait for the
    first run of the next interval, so that only its sums are carried while an interval is open. Streams with fewer runs
    have empty ones at the end.

    Attributes:
        token_index: Offsets of each run's tokens, ``(batch, runs, tokens)`` int64.
        token_mask: True for a run's tokens, ``(batch, runs, tokens)`` bool.
        run_index: Index of each of the call's tokens in [runs * tokens], ``(batch, length)`` int64.
        starts_document: Runs that begin with a document's first token, ``(batch, runs)`` bool.
        starts_interval: Runs that begin with an interval's first token, ``(batch, runs)`` bool.
    """

    token_index: Tensor
    token_mask: Tensor
    run_index: Tensor
    starts_document: Tensor
    starts_interval: Tensor

    @classmethod
    def from_segment(cls, segment: Segment, interval: int) -> IntervalRuns:
        """Return the runs of a call in intervals of ``interval`` tokens, found once for all layers."""
        runs: IntervalRuns = segment.memo((cls, interval), lambda: cls._find(segment, interval))
        return runs

    @classmethod
    def _find(cls, segment: Segment, interval: int) -> IntervalRuns:
        length, position = segment.length, segment.position
        num_tokens = min(interval, length)
        # As many as a stream without document starts can have, so that shapes do not depend on the position.
        num_runs = (length + interval - 2) // interval + 1
        offset = torch.arange(length, device=position.device)
        starts_run = (position % interval == 0) | (offset == 0)
        run = starts_run.cumsum(1) - 1
        if segment.has_document_starts and length > 1:
            # An exported program has room for documents of one token.
            num_runs = length if torch.compiler.is_exporting() else max(num_runs, int(run.max()) + 1)
        runs = torch.arange(num_runs, device=position.device).expand(position.shape[0], -1).contiguous()
        start = torch.searchsorted(run, runs)
        size = torch.searchsorted(run, runs, right=True) - start
        index = torch.arange(num_tokens, device=position.device)
        first = start.clamp(max=length - 1)
        first_position = position.gather(1, first)
        return cls(
            token_index=(start[..., None] + index).clamp(max=length - 1),
            token_mask=index < size[..., None],
            run_index=run * num_tokens + offset - start.gather(1, run),
            starts_document=(size > 0) & (first_position == 0),
            starts_interval=(size > 0) & (first_position % interval == 0),
        )

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return x ``(batch, length, dim)`` by run, each ``(batch, tokens, dim)``."""
        return gather_entries(x, self.token_index).unbind(1)

    def join(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return outputs by run, each ``(batch, tokens, dim)``, for the call's tokens, ``(batch, length, dim)``."""
        return gather_entries(torch.cat(list(outputs), dim=1), self.run_index)
