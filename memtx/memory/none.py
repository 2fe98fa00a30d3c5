"""No memory: attention reaches back to the start of the call and nothing is carried, the baseline for all others."""

from __future__ import annotations

from torch import Tensor

from memtx.memory.base import ContentAttention, Memory, View
from memtx.memory.recurrent import sliding_window
from memtx.segment import Segment
from memtx.state import state_dataclass


@state_dataclass
class NoState:
    """An empty state."""


class NoMemory(Memory[NoState]):
    """A memory that carries nothing from one call to the next."""

    supports_padding = True
    unbounded = False
    depends_on_segmentation = True

    def init_state(self, batch_size: int, *, like: Tensor) -> NoState:
        """Return the empty state."""
        return NoState()

    def read(self, state: NoState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Open the segment alone: every token is visible to the later ones of its document."""
        return View((x,), segment.memo("none", lambda: sliding_window(segment, 0, None)), next_state=state)
