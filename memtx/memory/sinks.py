"""Attention sinks: the first tokens of a document, kept for good (StreamingLLM, Xiao et al. 2023, section 3.2).

A pretrained model attends to the first tokens and fails once its window has left them behind. StreamingLLM gives them
fixed positions before the window; here they have positions at the far end of the window, or none, however long the
document is. Keys and values are the layer's own, so there is nothing to learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from torch import Tensor

from memtx.errors import MemtxError, check_at_least
from memtx.memory.base import ContentAttention, Memory, Readout, View
from memtx.memory.intervals import attend_by_chunk, split_into_chunks
from memtx.memory.parts import gather_entries
from memtx.segment import Segment
from memtx.state import state_dataclass


@state_dataclass
class SinkState:
    """Layer inputs of the open document's first tokens, ``(batch, num_sinks, dim)``, zero where it is shorter."""

    hidden: Tensor


@dataclass(frozen=True)
class SinkPlan:
    """The sinks that the queries of a call see; shared by layers of equal settings.

    Within any ``exclude_recent`` consecutive tokens at most one document's sinks leave the window. So there is one
    version of the sinks per chunk of that length, and a chunk's queries meet two: the previous one and the chunk's own.

    Attributes:
        version_indices: Indices in [sinks | segment] of each version's inputs, ``(batch, chunks + 1, num_sinks)``
            int64.
        mask: Visible sinks of both versions, ``(batch, chunks, 1, chunk_length, 2 * num_sinks)`` bool.
        next_indices: Indices of the next state's inputs, ``(batch, num_sinks)`` int64.
        next_missing: Sinks that the document has not reached yet, ``(batch, num_sinks, 1)`` bool.
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


class SinkMemory(Memory[SinkState]):
    """The first tokens of every document, next to an exact memory whose window leaves them behind.

    Args:
        dim: Width of the hidden states.
        num_sinks: First tokens kept.
        exclude_recent: Age in tokens at which a sink is read here; the layer's window, so that none is read twice.
        use_positions: If True, queries see the sinks at the end of the window, the first one ``exclude_recent - 1``
            positions back, which is the largest distance known to a model trained on texts of that length. If False,
            sinks have no positions, as if at the query's own.

    Raises:
        MemtxError: A number is out of range, or sinks would be needed before all of them are read.
    """

    uses_layer_projections = True
    needs_gate = False

    def __init__(self, dim: int, num_sinks: int = 4, exclude_recent: int = 512, use_positions: bool = False) -> None:
        super().__init__(dim)
        check_at_least(1, num_sinks=num_sinks, exclude_recent=exclude_recent)
        if num_sinks > exclude_recent + 1:
            raise MemtxError(
                f"num_sinks is {num_sinks}, exclude_recent is {exclude_recent}.",
                "Give num_sinks of at most exclude_recent + 1.",
            )
        self.num_sinks = num_sinks
        self.exclude_recent = exclude_recent
        self.use_positions, self.supports_relative_positions = use_positions, not use_positions

    def init_state(self, batch_size: int, *, like: Tensor) -> SinkState:
        """Return zeros: no token read."""
        return SinkState(like.new_zeros(batch_size, self.num_sinks, self.dim))

    def read(self, state: SinkState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Open the first tokens of the open document and of those that start in the segment."""
        plan = segment.memo((SinkMemory, self.num_sinks, self.exclude_recent), lambda: self._build_plan(segment))
        entries = torch.cat([state.hidden.to(x.dtype), x], dim=1)
        inputs = gather_entries(entries, plan.version_indices).flatten(1, 2)
        keys, values = (attention.project(inputs, projection, frozen=False) for projection in ("key", "value"))
        if self.use_positions:
            sink = torch.arange(self.num_sinks, dtype=torch.float64, device=x.device)
            distance = (self.exclude_recent - 1 - sink).clamp(min=0)
            keys = attention.apply_relative(keys, distance.repeat(plan.version_indices.shape[1]))
        by_version = "b (v s) h d -> b v h s d"
        keys, values = (rearrange(part, by_version, s=self.num_sinks) for part in (keys, values))
        next_state = SinkState(gather_entries(entries, plan.next_indices).masked_fill(plan.next_missing, 0.0))
        return View.readout_only(segment, _ReadContext(keys, values, plan.mask), next_state)

    def readout(self, view: View, q: Tensor) -> Readout:
        """Attend to the sinks of each query's document."""
        context: _ReadContext = view.context
        k, v = (torch.cat([part[:, :-1], part[:, 1:]], dim=-2) for part in (context.keys, context.values))
        return attend_by_chunk(q, k, v, context.mask)

    def _build_plan(self, segment: Segment) -> SinkPlan:
        num_sinks, age, position, length = self.num_sinks, self.exclude_recent, segment.position, segment.length
        batch_size, num_chunks, chunk_length = position.shape[0], -(-length // age), min(age, length)
        sink = torch.arange(num_sinks, device=position.device)
        offset = torch.arange(length, device=position.device)
        chunk_start = torch.arange(num_chunks, device=position.device) * chunk_length
        split = partial(split_into_chunks, num_chunks=num_chunks, chunk_length=chunk_length)

        def sink_indices(document_start: Tensor) -> Tensor:
            """Return the indices in [sinks | segment] of the sinks of documents that start at these offsets."""
            sink_offset = document_start[..., None] + sink
            index = torch.where(sink_offset < 0, sink, num_sinks + sink_offset)
            return index.clamp(max=num_sinks + length - 1)

        leaves_window = split((position == age).int(), fill=0)
        left_at = leaves_window.argmax(-1) + chunk_start
        written = torch.where(leaves_window.any(-1)[..., None], sink_indices(left_at - age), -1)
        # A chunk without a version of its own has the newest one before it, at first the carried one.
        versions = torch.cat([sink.expand(batch_size, 1, num_sinks), written], dim=1)
        number = torch.arange(num_chunks + 1, device=position.device)[:, None]
        newest = torch.where(versions >= 0, number, 0).cummax(1).values

        in_chunk = split(offset - position + age, fill=-1) >= chunk_start[:, None]
        visible = split(position - age, fill=-1)[..., None] >= sink
        mask = torch.cat([visible & ~in_chunk[..., None], visible & in_chunk[..., None]], dim=-1)
        return SinkPlan(
            version_indices=versions.gather(1, newest),
            mask=mask[:, :, None],
            next_indices=sink_indices(length - segment.next_position),
            next_missing=(segment.next_position[:, None] <= sink)[..., None],
        )
