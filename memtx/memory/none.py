"""No memory: a position sees its document as far as the same call reaches back, and nothing is carried.

Here alone the cutting of a stream matters, by nature: it is the thing to compare memories with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memtx.memory.base import ContentAttention, EntryPositions, LayerActivations, Losses, Memory, View
from memtx.ops.attention.mask import KeyRange, Visibility
from memtx.segment import Segment
from memtx.state import state_dataclass


@state_dataclass
class NoState:
    """Nothing."""


class NoMemory(Memory[NoState]):
    """Carries nothing from one call to the next."""

    write_source = "nothing"
    supports_padding = True
    unbounded = False

    @property
    def depends_on_segmentation(self) -> bool:
        """True: what a token sees begins with the call."""
        return True

    def init_state(self, batch_size: int, *, like: Tensor) -> NoState:
        """Return nothing."""
        return NoState()

    def read(self, state: NoState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Open the segment alone: every token is seen by the later ones of its document."""
        return View((x,), segment.memo("none", lambda: _entry_positions(segment)), None)

    def write(self, view: View, segment: Segment, activations: LayerActivations) -> tuple[NoState, Losses]:
        """Keep nothing."""
        return NoState(), {}


def _entry_positions(segment: Segment) -> EntryPositions:
    tick = torch.arange(segment.length, device=segment.position.device)[None]
    visibility = Visibility(
        tick.expand_as(segment.document_end),
        segment.document_end,
        segment.length,
        (KeyRange(segment.length, 0, 1, None),),
    )
    return EntryPositions(tick.double(), visibility)
