"""No memory: attention reaches back to the start of the call and nothing is carried, the baseline for all others."""

from __future__ import annotations

import torch
from torch import Tensor

from memtx.memory.base import ContentAttention, EntryPositions, LayerActivations, Losses, Memory, View
from memtx.ops.attention.mask import KeyRange, Visibility
from memtx.segment import Segment
from memtx.state import state_dataclass


@state_dataclass
class NoState:
    """An empty state."""


class NoMemory(Memory[NoState]):
    """A memory that carries nothing from one call to the next."""

    supports_padding = True
    unbounded = False

    @property
    def depends_on_segmentation(self) -> bool:
        """True: no token sees beyond its call."""
        return True

    def init_state(self, batch_size: int, *, like: Tensor) -> NoState:
        """Return the empty state."""
        return NoState()

    def read(self, state: NoState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Open the segment alone: every token is visible to the later ones of its document."""
        return View((x,), segment.memo("none", lambda: _entry_positions(segment)), None)

    def write(self, view: View, segment: Segment, activations: LayerActivations) -> tuple[NoState, Losses]:
        """Carry nothing."""
        return NoState(), {}


def _entry_positions(segment: Segment) -> EntryPositions:
    offset = torch.arange(segment.length, device=segment.position.device)[None]
    key_ranges = (KeyRange(segment.length, 0, 1, None),)
    visibility = Visibility(offset.expand_as(segment.document_end), segment.document_end, segment.length, key_ranges)
    return EntryPositions(offset.double(), visibility)
