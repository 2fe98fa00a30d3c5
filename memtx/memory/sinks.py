"""The first tokens of a document, kept for good (attention sinks, StreamingLLM, Xiao et al. 2023, section 3.2).

A pretrained model puts weight on the first tokens whatever they say, and a window that has left them behind ruins it.
StreamingLLM gives them fixed places before the window. Here they have these at the window's far end, or are read
without any: either way it is the same however far the document has gone on. Their keys and values are the layer's own,
so nothing is learned beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from torch import Tensor

from memtx.errors import MemtxError, check_at_least
from memtx.memory.base import ContentAttention, LayerActivations, Losses, Memory, Readout, View
from memtx.memory.intervals import attend_by_chunk, split_into_chunks
from memtx.segment import Segment
from memtx.state import state_dataclass


@state_dataclass
class SinkState:
    """The beginning of the document.

    Attributes:
        hidden: (rows, num_sinks, dim), the layer inputs of its first tokens, zero where it is shorter.
    """

    hidden: Tensor


@dataclass(frozen=True)
class SinkPlan:
    """Which sinks the queries of a call see; shared by layers of equal settings.

    In any ``exclude_recent`` ticks of a row at most one document's sinks leave the window, so there is room for as many
    versions as there are stretches of that length, and a stretch's queries meet two: found, and taken up in it.

    Attributes:
        version_indices: (rows, stretches + 1, num_sinks) int64, where the versions' inputs stand in [sinks | segment].
        mask: (rows, stretches, 1, ticks, 2 num_sinks) bool.
        next_indices: (rows, num_sinks) int64, where the next state's stand.
        next_missing: (rows, num_sinks, 1) bool, which of these the document has not reached.
    """

    version_indices: Tensor
    mask: Tensor
    next_indices: Tensor
    next_missing: Tensor


@dataclass(frozen=True)
class _ReadContext:
    keys: Tensor
    values: Tensor
    mask: Tensor
    next_state: SinkState


class SinkMemory(Memory[SinkState]):
    """The first tokens of every document, beside an exact memory that leaves them behind.

    Args:
        dim: width of the hidden states.
        num_sinks: first tokens kept.
        exclude_recent: how old a token is when it is read here: the layer's window, so that none is read twice.
        use_positions: whether a query sees them where the window ends, the first one ``exclude_recent - 1`` positions
            back: the farthest that a model trained on texts of that length knows. False: without positions, as if at
            the query's own.

    Raises:
        MemtxError: a number is out of range, or the first tokens would be needed before they are all there.
    """

    uses_layer_projections = True
    needs_gate = False

    def __init__(self, dim: int, num_sinks: int = 4, exclude_recent: int = 512, use_positions: bool = False) -> None:
        super().__init__(dim)
        check_at_least(1, num_sinks=num_sinks, exclude_recent=exclude_recent)
        if num_sinks > exclude_recent + 1:
            raise MemtxError(
                f"num_sinks is {num_sinks}, exclude_recent is {exclude_recent}.",
                "Keep at most one token more than are skipped.",
            )
        self.num_sinks = num_sinks
        self.exclude_recent = exclude_recent
        self.use_positions = use_positions

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"num_sinks={self.num_sinks}, exclude_recent={self.exclude_recent}, use_positions={self.use_positions}"

    def init_state(self, batch_size: int, *, like: Tensor) -> SinkState:
        """Return no tokens."""
        return SinkState(like.new_zeros(batch_size, self.num_sinks, self.dim))

    def read(self, state: SinkState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Open the beginnings of the carried document and of those that begin here."""
        plan = segment.memo((SinkMemory, self.num_sinks, self.exclude_recent), lambda: self._build_plan(segment))
        known = torch.cat([state.hidden.to(x.dtype), x], dim=1)

        def taken(index: Tensor) -> Tensor:
            """(rows, ...) places -> (rows, ..., dim)."""
            base = torch.arange(x.shape[0], device=x.device).view(-1, *(1,) * (index.dim() - 1)) * known.shape[1]
            return known.flatten(0, 1).index_select(0, (base + index).flatten()).view(*index.shape, self.dim)

        inputs = taken(plan.version_indices).flatten(1, 2)
        split = "r (b s) h d -> r b h s d"
        keys, values = (attention.project(inputs, part, frozen=False) for part in ("key", "value"))
        if self.use_positions:
            sink = torch.arange(self.num_sinks, dtype=torch.float64, device=x.device)
            keys = attention.apply_relative(
                keys, (self.exclude_recent - 1 - sink).clamp(min=0).repeat(plan.version_indices.shape[1])
            )
        keys, values = (rearrange(part, split, s=self.num_sinks) for part in (keys, values))
        after = SinkState(taken(plan.next_indices).masked_fill(plan.next_missing, 0.0))
        return View.readout_only(segment, _ReadContext(keys, values, plan.mask, after))

    def readout(self, view: View, q: Tensor) -> Readout:
        """Attend to the sinks of each query's document."""
        kept: _ReadContext = view.context
        k, v = (torch.cat([part[:, :-1], part[:, 1:]], dim=-2) for part in (kept.keys, kept.values))
        return attend_by_chunk(q, k, v, kept.mask)

    def write(self, view: View, segment: Segment, activations: LayerActivations) -> tuple[SinkState, Losses]:
        """Keep the beginning of the newest document."""
        kept: _ReadContext = view.context
        return kept.next_state, {}

    def _build_plan(self, segment: Segment) -> SinkPlan:
        count, skip, n, position = self.num_sinks, self.exclude_recent, segment.length, segment.position
        rows, stretches = position.shape[0], -(-n // skip)
        ticks = min(skip, n)
        device = position.device
        sink = torch.arange(count, device=device)

        cut = partial(split_into_chunks, num_chunks=stretches, chunk_length=ticks)

        def places(tick: Tensor) -> Tensor:
            """Where sinks stand whose first has this tick: before the call among the carried, by their number."""
            at = tick[..., None] + sink
            return torch.where(at < 0, sink, count + at)

        leaving = cut((position == skip).int(), fill=0)
        at = leaving.argmax(-1) + torch.arange(stretches, device=device) * ticks
        found = torch.where(leaving.any(-1)[..., None], places(at - skip).clamp(max=count + n - 1), -1)
        # The newest version that was taken up so far, or the carried one.
        versions = torch.cat([sink.expand(rows, 1, count), found], dim=1)
        number = torch.arange(stretches + 1, device=device)[:, None]
        newest = torch.where(versions >= 0, number, 0).cummax(1).values
        source = versions.gather(1, newest)

        begin = torch.arange(stretches, device=device)[:, None] * ticks
        tick = torch.arange(n, device=device)
        own = cut(tick - position + skip, fill=-1) >= begin
        old = cut(position - skip, fill=-1)[..., None] >= sink
        seen = torch.cat([old & ~own[..., None], old & own[..., None]], dim=-1)[:, :, None]

        first = n - segment.next_position
        missing = (segment.next_position[:, None] <= sink)[..., None]
        return SinkPlan(source, seen, places(first).clamp(max=count + n - 1), missing)
